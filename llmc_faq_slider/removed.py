"""What recipes could name once, and why they no longer can."""

from collections.abc import Mapping
from typing import Any

__all__ = ["REMOVED", "refuse_removed", "removed_in"]

_BY_CHANCE = (
    "on the project's benchmark it did not beat random (docs/faq.md); use random or "
    "expert_nll"
)
#: reasons by stage and by field, or by field and value
REMOVED = {
    "FAQModifier": {
        "selector: typical": _BY_CHANCE,
        "selector: target_nll": _BY_CHANCE,
        "selector: longest": _BY_CHANCE,
        "oversample": "no measurement showed that choosing samples by activation "
        "coverage gains anything; leave it out",
        "keep_language": "its lists of function words knew seven languages, and no "
        "measurement showed a gain; leave it out",
    },
    "SliderQuantModifier": {
        "stage_order": "sweeps over all windows did not beat stages inside each window "
        "(docs/experiments.md), which is the only order now; leave it out",
    },
}


def removed_in(stage: str, fields: Mapping[str, Any]) -> dict[str, str]:
    """A sentence per field in which a recipe names what a stage no longer has.

    :param stage: name of the stage's class
    """
    reasons = REMOVED.get(stage, {})
    return {
        name: f"{stage}'s {what} was removed: {reasons[what]}."
        for name, value in fields.items()
        for what in (name, f"{name}: {value}")
        if what in reasons
    }


def refuse_removed(stage: str, fields: Any) -> None:
    """
    Refuse fields of a stage that name what it no longer has.

    :raises ValueError: with a sentence per such field
    """
    if isinstance(fields, Mapping) and (found := removed_in(stage, fields)):
        raise ValueError(" ".join(found.values()))

"""The only part of the package that touches llm-compressor's internals."""

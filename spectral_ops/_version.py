"""The package's version, where every layer may import it and setuptools reads it."""

__version__ = "0.1.0"

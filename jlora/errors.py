"""The errors of jlora. Each message says what was found, what was wanted, and the way out."""

__all__ = ["AdapterError", "ConfigError", "DataError", "JloraError", "JloraWarning", "TargetError"]


class JloraError(ValueError):
    """Base class of every error that jlora raises on purpose."""


class JloraWarning(UserWarning):
    """What is computed is right, and likely not what was meant."""


class ConfigError(JloraError):
    """A configuration holds an unknown key or a value that is not allowed."""


class TargetError(JloraError):
    """The patterns of a configuration and the paths of a params tree do not fit."""


class AdapterError(JloraError):
    """An adapter, its weight and its rank do not fit."""


class DataError(JloraError):
    """A file, folder or dataset cannot be used as it is."""

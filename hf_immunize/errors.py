"""Typed errors. Each message says what was expected, what came, and what to do."""

from __future__ import annotations


class ImmunizeError(Exception):
    """Base class of every error this package raises on purpose."""


class DataError(ImmunizeError, ValueError):
    """A dataset, batch or label set that cannot be used as given."""


class WorkerError(ImmunizeError, RuntimeError):
    """A data worker that died, or took longer than ``dataloader_timeout``."""


class ConfigError(ImmunizeError, ValueError):
    """An option whose value is unknown or contradicts another option."""


class ModelError(ImmunizeError, ValueError):
    """A model without the part that was asked for (a linear head, a module name, a base)."""


class CaptureError(ImmunizeError, RuntimeError):
    """A feature hook that caught nothing, or more than one thing."""


class SpectrumError(ImmunizeError, ValueError):
    """A matrix whose spectrum is not defined: empty, not finite, or zero."""


class DecompositionError(SpectrumError):
    """A decomposition that failed: a matrix with NaN, infinite or far too large values."""


class RecordError(ImmunizeError, ValueError):
    """A file on disk that is missing, truncated, tampered with, or of an unknown schema."""


class IncompleteExamError(ImmunizeError, RuntimeError):
    """A certificate was asked for before its exam was sat."""


class RunMismatchError(ImmunizeError, RuntimeError):
    """An output folder that already holds a different run."""


class TrainingDivergedError(ImmunizeError, RuntimeError):
    """A loss or a spectrum that stopped being finite during training."""


class StageError(ImmunizeError, RuntimeError):
    """A stage of a run that did not end well; the message holds the end of its log."""


class NotImmunizedError(ImmunizeError, RuntimeError):
    """Training ended without what it was for, and that was required."""


class DeviceMemoryError(ImmunizeError, RuntimeError):
    """The device ran out of memory; the message names the options that need less."""


class VerificationError(ImmunizeError, ValueError):
    """Published files that are not what their certificate says, or a certificate that a policy does not accept."""


class PublishRefusedError(ImmunizeError, ValueError):
    """A folder that the gate does not let out."""


class PolicyUnmetError(PublishRefusedError):
    """A folder that is what its certificate says, which says less than the policy asks for."""


class HubError(ImmunizeError, RuntimeError):
    """The Hub did not do what was asked: no access, a conflict, a limit, or no connection."""

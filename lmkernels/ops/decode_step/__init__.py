from .api import StepLayer, StepModel, decode_step

__all__ = ["StepLayer", "StepModel", "decode_step"]

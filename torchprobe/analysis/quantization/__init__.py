"""What will break in eight bits: formats, forecasts from :class:`torchprobe.statistics.Exponents`, and remedies.

============  =================================================================================
``formats``   the formats, reference quantizers in float64, and what they do, measured
``spread``    how large the values are, from exponents
``forecast``  what a format does, from exponents alone
``features``  how the error is divided among the features
``layers``    the layers of a network: their forecasts, and computing as if they were rounded
``network``   what all layers together do to the output, measured
``remedies``  smoothing scales (SmoothQuant), and where to clip
============  =================================================================================
"""

from torchprobe.analysis.quantization.forecast import Forecast, forecast, forecasts
from torchprobe.analysis.quantization.formats import FORMATS, Format, Measured, measure, quantize
from torchprobe.analysis.quantization.remedies import Clipping, clipping, smoothing_scales

__all__ = [
    "FORMATS",
    "Clipping",
    "Forecast",
    "Format",
    "Measured",
    "clipping",
    "forecast",
    "forecasts",
    "measure",
    "quantize",
    "smoothing_scales",
]

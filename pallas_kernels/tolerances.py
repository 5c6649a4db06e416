"""The one table of how close a result must come to its reference."""

# RMS(error) / RMS(reference) that a result of the dtype may show against a reference of at least its precision.
# The 16-bit rows are about twice the error of one rounding of the result: states are float32 whatever the dtype.
TOLERANCES = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}

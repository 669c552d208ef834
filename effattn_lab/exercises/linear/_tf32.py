"""The remark on TF32 in hints, for those whom it can concern."""

import torch

#: Appended to the hint of a kernel's first property; empty where no GPU could have rounded anything.
ON_A_GPU = (
    " On this GPU tl.dot rounds float32 to TF32 unless input_precision='ieee'."
    if torch.cuda.is_available()
    else ""
)

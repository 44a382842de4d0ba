"""Let a torchvision that was built for CUDA be imported beside a torch for CPUs.

Its operators, in C++, do not load there, and its import fails: it describes nms and qnms, which nobody
declared. This declares both, without code behind them. `tools/vllm_environment.sh` puts it into .venv-vllm
where it is needed, and says so.
"""

import torch

LIBRARY = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    LIBRARY.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

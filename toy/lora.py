"""A LoRA over frozen weights: low-rank updates of the temporal attention (Hu et al. 2021,
arXiv:2106.09685), trained, saved and sampled by the code as it is.

    python toy/lora.py train.py --model weights/svd_xt.safetensors --data videos/ --lr 1e-4 \
        --extension weights/model.fp16.safetensors --out runs/lora
    python toy/lora.py sample.py photo.jpg --model weights/svd_xt.safetensors \
        --extension weights/model.fp16.safetensors runs/lora/exvideo-005000.safetensors

Without the release, and with --frames 25, it is a LoRA of SVD-XT itself, at its native length. You
can also put a modification of your own into section 4 of exsvd.py.
"""

import os
import runpy
import sys

from torch import nn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
import exsvd

RANK = 8


class LoRA(nn.Module):
    """A linear layer and its update B A, which starts as 0."""

    def __init__(self, base):
        super().__init__()
        self.base, weight = base, base.weight  # files find the weights of a layer called base
        A = weight.new_empty(RANK, base.in_features).normal_(std=base.in_features**-0.5)
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(weight.new_zeros(base.out_features, RANK))

    def forward(self, x):
        return self.base(x) + x @ self.A.T @ self.B.T


def extend(unet, num_frames=128, exvideo=exsvd.extend):
    for block in exvideo(unet, num_frames).temporal_blocks():
        for name in ("to_q", "to_k", "to_v", "to_out"):
            if not isinstance(getattr(block.attn1, name), LoRA):  # extend() may be called again
                setattr(block.attn1, name, LoRA(getattr(block.attn1, name)))
    return unet


exsvd.extend = extend
exsvd.is_extension_parameter = lambda name: name.endswith((".A", ".B"))

if __name__ == "__main__":
    [script] = {"train.py", "sample.py"}.intersection(sys.argv)
    sys.argv.remove(script)
    runpy.run_path(os.path.join(ROOT, script), run_name="__main__")

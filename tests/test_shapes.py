"""The shapes in the signatures, checked at run time by beartype in a process of their own."""

import subprocess
import sys

CODE = """
from jaxtyping import install_import_hook
with install_import_hook("vqstudy", "beartype.beartype"):
    import torch
    from vqstudy.codebook import kmeans
    from vqstudy.data import images
    from vqstudy.models import Autoencoder, reconstruction_loss
    from vqstudy.quantizers import recipe
    from vqstudy.scores import reconstruction_scores, sample_pair
    from vqstudy.search import nearest, two_nearest

torch.manual_seed(0)
x = images("photos", "test", limit=4).x
SPECS = (
    "none", "vq + l2 + replace", "vq + rotation + ema", "vq + affine + opt", "stochastic", "simvq",
    "gumbel", "sq", "router", "fsq", "lfq", "bsq",
)
for spec in SPECS:
    model = Autoencoder(recipe(spec, 8, 64, channel_dim=1), channels=8)
    for _ in range(2):
        reconstruction_loss(model, x.float() / 255)[0].backward()
    reconstruction_scores(model, x)
    sample_pair(model, x)

z, codebook = torch.randn(50, 3), torch.randn(40, 3)
kmeans(z, 4)
for dtype in (torch.float32, torch.bfloat16, torch.float64):
    for metric in ("euclidean", "cosine"):
        for precision in ("float32", "bfloat16"):
            nearest(z.to(dtype), codebook.to(dtype), metric, precision=precision)
        two_nearest(z.to(dtype), torch.cat([codebook, codebook]).to(dtype), metric, exact=True)

try:
    nearest(torch.randn(5), codebook)
except Exception as error:
    name = type(error).__name__
    assert "TypeCheck" in name or "Violation" in name, name
else:
    raise SystemExit("the hook checked nothing")
print("shapes hold")
"""


def test_signatures_hold_at_run_time():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0 and "shapes hold" in done.stdout, done.stderr[-3000:]

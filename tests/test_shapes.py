"""The shapes in the signatures, checked at run time by beartype in a process of their own."""

import subprocess
import sys

CODE = """
from jaxtyping import install_import_hook
with install_import_hook("vqstudy", "beartype.beartype"):
    import torch
    from vqstudy.codebook import kmeans
    from vqstudy.data import images
    from vqstudy.measure import Meter
    from vqstudy.models import Autoencoder, reconstruction_loss
    from vqstudy.quantizers import recipe
    from vqstudy.scores import reconstruction_scores, sample_pair
    from vqstudy.search import nearest
torch.manual_seed(0)
x = images("photos", "test", limit=4).x
for spec in ("none", "vq + l2 + replace", "vq + rotation + ema", "vq + affine + opt", "stochastic", "simvq", "gumbel", "sq", "router", "fsq", "lfq", "bsq"):
    model = Autoencoder(recipe(spec, 8, 64, channel_dim=1), channels=8)
    for _ in range(2): reconstruction_loss(model, x.float() / 255)[0].backward()
    reconstruction_scores(model, x), sample_pair(model, x)
nearest(torch.randn(5, 3), torch.randn(4, 3), exact=True), kmeans(torch.randn(50, 3), 4)
try: nearest(torch.randn(5), torch.randn(4, 3))
except Exception as error: assert "TypeCheck" in type(error).__name__ or "Violation" in type(error).__name__, type(error)
else: raise SystemExit("the hook checked nothing")
print("shapes hold")
"""


def test_signatures_hold_at_run_time():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0 and "shapes hold" in done.stdout, done.stderr[-3000:]

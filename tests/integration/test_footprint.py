"""The memory estimate against torch's own count, the options' consequences, and a real process."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

import train
import trainer.planning.memory_ledger
from scripts import bench_memory, full_size
from scripts.bench.machine import forget_peak, held, peak
from tests.tiny import tiny_models
from trainer.config import load_config
from trainer.config.schema import OptimizerConfig, TrainConfig, optimizer_classes
from trainer.diffusion.objective import Inputs, Networks, make_objective
from trainer.models.family import SD1
from trainer.models.networks import empty_text_encoder, empty_unet, empty_vae
from trainer.models.options import FreezingOptions, LoraOptions, ModelOptions, TrainableOptions
from trainer.models.placement import place
from trainer.models.trainable import apply_freezing
from trainer.optim.optimizer_set import OptimizerSet
from trainer.planning.memory import KEPT, Estimate, estimate
from trainer.planning.memory_advice import cheapest_key
from trainer.planning.memory_ledger import ACTIVATIONS, COPIES, EMA, GRADIENTS, STATE, WEIGHTS, Ledger
from trainer.planning.memory_trace import Phase, Work, meta_copies, trace_memory
from trainer.training.precision import Precision
from trainer.training.step import train_step

ROOT = Path(__file__).resolve().parents[2]
CPU = Precision(torch.device("cpu"), None, None, torch.float32)
CUDA = Precision(torch.device("cuda"), torch.bfloat16, None, torch.float32)
WORK = Work(size=(64, 64), images=2)


@pytest.fixture(scope="module")
def models():
    """Networks of SD 1.5's width and few layers: without data, size costs nothing."""
    shape = {"block_out_channels": [320, 640], "layers_per_block": 1}
    unet = {
        **SD1.default.unet,
        **shape,
        "down_block_types": SD1.default.unet["down_block_types"][2:],
        "up_block_types": SD1.default.unet["up_block_types"][:2],
    }
    return replace(
        tiny_models(0),
        unet=empty_unet(unet),
        text_encoder=empty_text_encoder({**SD1.default.text_encoder, "num_hidden_layers": 2}),
        vae=empty_vae({**SD1.default.vae, "layers_per_block": 1}),
    )


def options(name="dadapt_adam", fused=False, **changes):
    chosen = optimizer_classes()[name](lr=1.0, lr_scheduler="constant")
    chosen = replace(chosen, fused_backward=True) if fused else chosen
    optimizers = OptimizerConfig(
        unet=chosen, text_encoder=chosen, freezing=FreezingOptions(freeze_embeddings=True)
    )
    return TrainConfig(model=ModelOptions(resume_ckpt="tiny"), optimizers=optimizers, **changes)


def step(config, models, precision=CPU, work=WORK):
    return next(
        phase for phase in trace_memory(config, models, precision, work) if phase.name == "training step"
    )


def of(phase, kind):
    return sum(size for (what, _), size in phase.bytes_by_kind.items() if what == kind)


def rounded(tensors):
    return sum(-(-tensor.numel() * tensor.element_size() // 512) * 512 for tensor in tensors)


def test_a_lora_holds_its_matrices_beside_frozen_weights(models):
    lora = TrainableOptions(lora=LoraOptions(rank=8, targets="all"), gradient_checkpointing=True)
    whole = step(options(parts=replace(lora, lora=None)), models, CUDA)
    phase = step(options(parts=lora), models, CUDA)
    halved = step(options(parts=lora), models, replace(CUDA, weights=torch.bfloat16))
    matrices = apply_freezing(meta_copies(models), lora, FreezingOptions())
    size = rounded(parameter for named in matrices.parameters.values() for _, parameter in named)
    assert 0 < of(phase, GRADIENTS) <= size, "the peak is inside the backward pass"
    assert of(phase, STATE) == pytest.approx(3 * size, rel=0.15), "each is padded"
    assert of(phase, WEIGHTS) == of(whole, WEIGHTS) + size
    networks = sum(phase.of(WEIGHTS, network) for network in ("unet", "text encoder")) - size
    assert of(halved, WEIGHTS) == pytest.approx(of(phase, WEIGHTS) - networks / 2, rel=1e-3), (
        "the matrices stay in fp32"
    )
    assert of(phase, ACTIVATIONS) < 1.5 * of(whole, ACTIVATIONS)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_holds_what_torch_counts(checkpointing, monkeypatch):
    """The same networks, trained on the CPU under torch's own counter, which does not round sizes there."""
    parts = TrainableOptions(gradient_checkpointing=checkpointing)
    config = options("adamw", parts=parts)
    everything = replace(
        config.optimizers, freezing=FreezingOptions(freeze_embeddings=False)
    )  # on frozen weights its hooks fail
    config = replace(config, optimizers=everything)
    expected = tiny_models(0)
    trained = apply_freezing(expected, parts, config.optimizers.freezing)
    place(expected, torch.device("cpu"), channels_last=True, weights=torch.float32)
    networks = Networks(expected.unet, expected.text_encoder, expected.vae)
    learning = {name: [parameter for _, parameter in named] for name, named in trained.parameters.items()}
    optimizers = OptimizerSet(dict.fromkeys(learning, config.optimizers.unet), learning, total_steps=2)
    objective = make_objective(
        config.objective,
        expected,
        seed=config.loop.seed,
        train_text_encoder="text encoder" in trained.parameters,
    )
    inputs = Inputs(
        pixels_BCHW=None,
        moments_BCHW=torch.zeros(8, 8, 8, 8),
        tokens_BT=torch.zeros(8, 77, dtype=torch.int64),
        scale_B=torch.ones(8),
        posterior_BCHW=torch.zeros(8, 4, 8, 8),
        noise_BCHW=torch.randn(8, 4, 8, 8),
        t_B=torch.full((8,), 500),
    )
    train_step([inputs], networks, objective, optimizers, step=0, images=8)
    tracker = MemTracker()
    tracker.track_external(networks.unet, networks.text_encoder, *optimizers.optimizers)
    with tracker:
        train_step([inputs], networks, objective, optimizers, step=1, images=8)
    counted = tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]
    monkeypatch.setattr(trainer.planning.memory_ledger, "GRAIN", 1)  # which it rounds to on CUDA alone
    on_cuda = Precision(
        torch.device("cuda"), None, None, torch.float32
    )  # where a VAE that is not needed waits elsewhere
    assert step(
        config, expected, on_cuda, Work(size=(64, 64), images=8, latents_kept=True)
    ).total == pytest.approx(counted, rel=0.03)


def test_weights_gradients_and_state_are_exact(models):
    found = step(options("adamw"), models)
    parameters = rounded(models.unet.parameters())
    assert (found.of(WEIGHTS, "unet"), found.of(GRADIENTS, "unet")) == (parameters, parameters)
    assert found.of(STATE, "unet") == pytest.approx(2 * parameters, rel=0.01)


@pytest.mark.parametrize("name", optimizer_classes())
def test_every_optimizer_keeps_the_state_that_it_really_keeps(name):
    config = options(name, parts=TrainableOptions(disable_textenc_training=True))
    real = tiny_models(0)
    parameters = list(real.unet.parameters())
    optimizer = config.optimizers.unet.build(parameters, 1.0)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    kept = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    bytes_of = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept}
    # Rounded up to 512 bytes for each of the parameters; the maps of bitsandbytes are shared by all.
    assert (
        0
        <= step(config, real).of(STATE, "unet") - sum(bytes_of.values())
        < (512 + 2 * 2048) * len(parameters)
    )


def test_each_key_spares_what_it_is_for(models):
    work = Work(size=(512, 512), images=4, latents_kept=True)
    plain = step(options(), models, CUDA, work)
    assert plain.of(COPIES, "unet") == pytest.approx(plain.of(WEIGHTS, "unet") / 2, rel=0.02), (
        "all are kept for backward"
    )
    frozen = options(parts=TrainableOptions(disable_textenc_training=True))
    without = step(frozen, models, CUDA, replace(work, contexts_kept=True))
    assert (
        without.of(STATE, "text encoder")
        == without.of(WEIGHTS, "text encoder")
        == without.of(WEIGHTS, "vae")
        == 0
    )
    saved = step(options(parts=TrainableOptions(gradient_checkpointing=True)), models, CUDA, work)
    assert of(saved, ACTIVATIONS) < 0.6 * of(plain, ACTIVATIONS) and of(saved, COPIES) < 0.7 * of(
        plain, COPIES
    )
    assert of(step(options("dadapt_adam8bit"), models, CUDA, work), STATE) == pytest.approx(
        of(plain, STATE) * 2.07 / 12, rel=0.02
    )
    small = Work(size=(64, 64), images=1, latents_kept=True)
    assert of(step(options(fused=True), models, CUDA, small), GRADIENTS) < 0.3 * of(
        step(options(), models, CUDA, small), GRADIENTS
    )
    half = step(options(), models, replace(CUDA, weights=torch.bfloat16), work)
    assert (
        half.of(WEIGHTS, "unet") == pytest.approx(plain.of(WEIGHTS, "unet") / 2, rel=0.01)
        and of(half, COPIES) < 1 << 18
    )
    sliced = step(options(parts=TrainableOptions(attn_type="slice")), models, CUDA, work)
    assert of(sliced, ACTIVATIONS) > 1.5 * of(plain, ACTIVATIONS), (
        "its matrices of attention are kept for backward"
    )


def test_what_is_kept_beside_training_counts(models):
    work = Work(size=(64, 64), images=2, latents_kept=True, evaluated=8, sample=(512, 512), sampled=4)
    config = options()
    config = replace(
        config, ema=replace(config.ema, ema_decay_rate=0.9), loop=replace(config.loop, grad_accum=4)
    )
    encoding, training, fixed, samples = trace_memory(config, models, CUDA, work)
    assert of(training, EMA) == 0, "kept in main memory"
    assert of(encoding, STATE) == 0 < of(fixed, STATE) == of(samples, STATE)
    assert (
        encoding.of(WEIGHTS, "vae")
        == samples.of(WEIGHTS, "vae")
        > 0
        == training.of(WEIGHTS, "vae")
        == fixed.of(WEIGHTS, "vae")
    )
    there = replace(config, ema=replace(config.ema, ema_device="cuda"))
    beside = step(there, models, CUDA, work)
    assert of(beside, EMA) == pytest.approx(
        of(beside, GRADIENTS), rel=0.2
    ) and beside.total == training.total + of(beside, EMA)
    once = replace(config, loop=replace(config.loop, grad_accum=1))
    assert (
        step(once, models, CUDA, replace(work, images=16)).total
        < step(config, models, CUDA, replace(work, images=16)).total
    )


def test_the_fixed_noise_loss_encodes_one_image_at_a_time_as_the_encoding_of_latents_does(models):
    work = Work(size=(512, 512), images=1, evaluated=4)
    _, fixed = trace_memory(options(), models, CUDA, work)
    encoding, _, _ = trace_memory(options(), models, CUDA, replace(work, latents_kept=True))
    assert of(fixed, ACTIVATIONS) == pytest.approx(of(encoding, ACTIVATIONS), rel=0.05)


def test_the_changes_proposed_come_in_their_order_and_end_where_it_fits(models):
    config = options("adamw")
    work = Work(size=(256, 256), images=4)
    config = replace(config, data=replace(config.data, batch_size=4))
    whole = estimate(config, models, CUDA, work, holds=2**40)
    assert whole.fits and not whole.spared
    tight = estimate(config, models, CUDA, work, holds=whole.peak - (1 << 28))
    assert not tight.fits and tight.spared[0][0] == cheapest_key(config)
    peaks = [whole.peak, *(peak for _, peak in tight.spared)]
    assert peaks == sorted(peaks, reverse=True) and peaks[-1] < whole.peak - (1 << 28) < peaks[-2]


@pytest.mark.parametrize("images", [pytest.param(n, marks=pytest.mark.slow) for n in (1, 4, 30)] + [16])
def test_d_adaptation_takes_no_more_than_adamw_in_8_bits(images):
    """SD 1.5 at full size: less than bitsandbytes' up to 16 images, and as AdamW of the same kernel."""
    arguments = [
        "--config",
        str(ROOT / "configs" / "sd15.json"),
        "--data_root",
        str(ROOT / "examples" / "faces"),
    ]
    config = load_config(arguments).config
    models = full_size.empty_models()

    def gib(**optimizers):
        changed = replace(config, optimizers=replace(config.optimizers, **optimizers))
        work = Work(size=(512, 512), images=images, latents_kept=True)
        return step(changed, models, CUDA, work).total / 2**30

    adamw = optimizer_classes()["adamw8bit"](lr=1e-6)
    fused = optimizer_classes()["adamw8bit_fused"](lr=1e-6, fused_backward=True)
    ours = gib()
    theirs, same_kernel = (gib(unet=chosen, text_encoder=chosen) for chosen in (adamw, fused))
    assert ours < theirs or images > 16
    assert ours < theirs + 0.1 and same_kernel < ours < same_kernel + 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "card", "changes"),
    [
        ("sd15_8gb", 8, []),
        ("sd15", 12, []),
        ("sd15_t4", 15, []),
        ("sd15_16gb", 16, []),
        ("sd15_16gb", 24, ["--batch_size", "8"]),
        ("sd15_lora", 8, []),
        ("sd15_lora", 16, ["--gradient_checkpointing", "false"]),
        ("sd15_lora", 24, ["--gradient_checkpointing", "false", "--batch_size", "8"]),
    ],
)
def test_shipped_configurations_fit_their_cards(tmp_path, monkeypatch, capsys, name, card, changes):
    monkeypatch.chdir(tmp_path)
    command = [
        "--config",
        str(ROOT / "configs" / f"{name}.json"),
        "--data_root",
        str(ROOT / "examples" / "faces"),
        *changes,
    ]
    assert train.main([*command, "--check", "json", "--vram", str(card)]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert memory["fits"] and memory["holds"] == card * 2**30 and memory["spared"] == []
    assert memory["peak"] < (card - 0.5) * 2**30, "a desktop has its share"


@pytest.mark.slow
def test_a_real_step_of_full_size_needs_what_was_estimated():
    """The smallest of the measured ones, which a machine of 8 GiB has room for; minutes."""
    options = bench_memory.parse(["--networks", "unet", "--one", "dadapt_adam8bit+fused+bf16"])
    command = [sys.executable, bench_memory.__file__, "--networks", "unet", "--one", options.one]
    measured = json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    )
    assert measured["baseline"] + bench_memory.estimated(options.one, options) == pytest.approx(
        measured["peak"], rel=0.05
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_convolution_on_the_cpu_takes_the_copies_that_are_estimated(dtype):
    """Two of its weights besides their gradient: blocks so large that malloc gives them back at once."""
    if not forget_peak():
        pytest.skip("the system does not count a peak")

    def backward(device):
        conv = torch.nn.Conv2d(1536, 1536, 3, padding=1, device=device, dtype=dtype)
        conv = conv.to(memory_format=torch.channels_last)
        images = torch.ones(1, 1536, 8, 8, device=device, dtype=dtype, requires_grad=True)
        return conv(
            images.to(memory_format=torch.channels_last)
        ).sum(), conv.weight.untyped_storage().nbytes()

    loss, size = backward("cpu")
    before = held()
    forget_peak()
    loss.backward()
    assert size > 2**25 and peak() - before == pytest.approx(3 * size, rel=0.15)

    ledgers = [Ledger(torch.device("meta"), on_cpu=on_cpu) for on_cpu in (False, True)]
    found = []
    for ledger in ledgers:
        with ledger:
            loss, _ = backward("meta")
            ledger.begin()
            standing = sum(ledger.at_peak.values())
            loss.backward()
        found.append(sum(ledger.at_peak.values()) - standing)
    assert found == [pytest.approx(size, rel=0.15), pytest.approx(3 * size, rel=0.15)]


def test_what_malloc_keeps_is_part_of_the_peak_on_a_cpu():
    phases = [Phase("training step", {(WEIGHTS, "unet"): 10 * 2**30})]
    assert Estimate(phases, "cpu", 2**30, None).peak == 11 * 2**30 + KEPT


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["adamw8bit", "dadapt_adam", "dadapt_adam8bit+fused"])
def test_a_real_step_on_cuda_needs_what_was_estimated(name):
    options = bench_memory.parse(
        ["--networks", "unet", "--device", "cuda", "--one", name, "--mixed_precision", "auto"]
    )
    command = [
        sys.executable,
        bench_memory.__file__,
        "--networks",
        "unet",
        "--device",
        "cuda",
        "--mixed_precision",
        "auto",
        "--one",
        name,
    ]
    measured = json.loads(
        subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    )
    assert bench_memory.estimated(name, options) == pytest.approx(measured["peak"], rel=0.1)


def test_lines_name_the_peak_and_what_would_fit():
    gib = 2**30
    found = Estimate(
        [Phase("training step", {(WEIGHTS, "unet"): 10 * gib})],
        "cuda",
        gib,
        8 * gib,
        [("Set x to y.", 7 * gib)],
    )
    lines = found.lines()
    assert lines[1].split() == ["weights", "10.00"]
    assert "peak: 11.5 GiB, in the training step (tensors alone: 10.0)" in lines
    assert (
        lines[-2].startswith("does not fit into the 8.0 GiB of the GPU")
        and lines[-1] == "  Set x to y. Then 7.0 GiB, which fits."
    )
    wide, tight = (replace(found, holds=size * gib).lines()[-1] for size in (13, 12))
    assert wide == "fits into the 13.0 GiB of the GPU"
    assert tight == "fits into the 12.0 GiB of the GPU, if no desktop or other program takes any"

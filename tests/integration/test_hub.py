"""Hub ids, against a hub of our own on this machine: the real client, its cache and its errors."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import train
from tests.runs import ADAMW, run_of, write
from tests.tiny import tiny_models, write_tiny_folder
from trainer.errors import UserError
from trainer.models.load import describe, load_models
from trainer.models.options import ModelOptions
from trainer.models.single_file import NETWORKS

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The few pages of the hub that the client asks for."""

    repositories: ClassVar[dict[str, Path]] = {}
    sent: ClassVar[list[str]] = []

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, format, *args):
        pass

    def answer(self, *, body: bool):
        path = self.path.partition("?")[0]
        for name, folder in self.repositories.items():
            files = sorted(
                file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()
            )
            if path in (
                f"/api/models/{name}",
                *(f"/api/models/{name}/revision/{known}" for known in ("main", COMMIT)),
            ):
                return self.reply(
                    json.dumps(
                        {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                    ).encode(),
                    body,
                )
            if path.startswith(f"/api/models/{name}/tree/"):
                tree = [
                    {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": etag(folder / f)}
                    for f in files
                ]
                return self.reply(json.dumps(tree).encode(), body)
            start = f"/{name}/resolve/{COMMIT}/"
            if path.startswith(start) and path.removeprefix(start) in files:
                if body:
                    self.sent.append(path.removeprefix(start))
                return self.reply(
                    (folder / path.removeprefix(start)).read_bytes(),
                    body,
                    etag(folder / path.removeprefix(start)),
                )
            if path.startswith(f"/api/models/{name}/revision/"):
                return self.reply(b"{}", body, status=404, code="RevisionNotFound")
        if "gated" in path:
            return self.reply(b"{}", body, status=403, code="GatedRepo")
        return self.reply(b"{}", body, status=401, code="RepoNotFound")

    def reply(self, content: bytes, body: bool, tag: str = "0", status: int = 200, code: str = ""):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        if code:
            self.send_header("X-Error-Code", code)
        self.end_headers()
        if body:
            self.wfile.write(content)


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(tmp_path, monkeypatch):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        address + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(Hub, "repositories", {})
    monkeypatch.setattr(Hub, "sent", [])
    yield Hub
    server.shutdown()
    server.server_close()


LATER = "f" * 40
"""A commit that the main branch moves to."""


def load(name, vae=None):
    return load_models(ModelOptions(resume_ckpt=name, vae=vae))


def assert_same(models, reference, networks=NETWORKS):
    for network in networks:
        expected = getattr(reference, network).state_dict()
        assert all(
            torch.equal(tensor, expected[name])
            for name, tensor in getattr(models, network).state_dict().items()
        )


def test_only_what_training_needs_is_downloaded_and_only_once(hub, tmp_path, monkeypatch):
    folder = write_tiny_folder(tmp_path / "served")
    for name in (
        "v1-5.ckpt",
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "safety_checker/model.safetensors",
    ):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"not to be read")
    hub.repositories["someone/some-model"] = folder
    options = ModelOptions(resume_ckpt="someone/some-model")
    before = describe(options)
    assert before.notes == (
        "resume_ckpt: someone/some-model is not in the hub cache and is downloaded when training starts.",
    )
    assert before.unet.config["block_out_channels"] == [8, 16] and not before.assumed
    assert {Path(name).suffix for name in hub.sent} == {".json"}  # no weights

    models = load_models(options)
    assert_same(models, tiny_models())
    assert models.source == "someone/some-model"
    assert {Path(name).name for name in hub.sent if not name.endswith(".json")} == {
        "diffusion_pytorch_model.safetensors",
        "model.safetensors",
    }

    count = len(hub.sent)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert_same(load_models(options), tiny_models())
    described = describe(options)
    assert described.notes == () and described.unet.config["block_out_channels"] == [8, 16]
    assert len(hub.sent) == count


def test_the_commit_of_a_model_is_recorded_and_loaded_again(hub, tmp_path, monkeypatch):
    hub.repositories["someone/some-model"] = write_tiny_folder(tmp_path / "served")
    models = load("someone/some-model")
    assert models.revision == COMMIT
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    refs = next((tmp_path / "cache").rglob("refs/main"))
    refs.write_text(LATER)  # as after a download of a later commit
    with pytest.raises(UserError, match="is not complete in the hub cache"):
        load("someone/some-model")
    options = ModelOptions(resume_ckpt="someone/some-model", revision=COMMIT)
    again = load_models(options)
    assert_same(again, tiny_models())
    assert again.revision == describe(options).revision == COMMIT
    assert load(str(write_tiny_folder(tmp_path / "local"))).revision is None


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_a_run_records_the_commit_and_is_resumed_with_it(hub, workplace, no_estimate, lora, capsys):
    hub.repositories["someone/some-model"] = write_tiny_folder(workplace / "served")
    settings = {"max_epochs": 1, "fixed_loss_images": 0, "first_samples": False, "save_format": "diffusers"}
    write(workplace, ADAMW, model="someone/some-model", lora=lora, **settings)
    assert train.main(["--stop_after_steps", "1"]) == 0
    run = run_of(workplace)
    assert json.loads((run / "train.json").read_text())["revision"] == COMMIT
    (checkpoint,) = (run / "ckpts").iterdir()
    page = (checkpoint / "README.md").read_text()
    assert f"(https://huggingface.co/someone/some-model) at revision `{COMMIT}`" in page
    if lora:
        assert json.loads((checkpoint / "base.json").read_text())["revision"] == COMMIT
    next((workplace / "cache").rglob("refs/main")).write_text(LATER)
    for more in (["--check"], []):
        capsys.readouterr()
        assert train.main(["--resume_ckpt", "findlast", *more]) == 0
        assert "Changed: revision" not in capsys.readouterr().out
    assert json.loads((run / "train.json").read_text())["revision"] == COMMIT


@pytest.mark.parametrize("form", ["vae alone", "whole model"])
def test_the_commits_of_vae_and_ema_model_are_recorded_and_resumed(
    hub, workplace, no_estimate, monkeypatch, form, capsys
):
    served = write_tiny_folder(workplace / "served", seed=1)
    hub.repositories["someone/vae"] = served / "vae" if form == "vae alone" else served
    hub.repositories["someone/average"] = served
    settings = {"max_epochs": 1, "fixed_loss_images": 0, "first_samples": False, "save_format": "diffusers"}
    ema = {"ema_decay_rate": 0.5, "ema_resume_model": "someone/average"}
    write(workplace, ADAMW, vae="someone/vae", **settings, **ema)
    assert train.main(["--stop_after_steps", "1"]) == 0
    run = run_of(workplace)

    def recorded():
        values = json.loads((run / "train.json").read_text())
        return values["vae_revision"], values["ema_resume_revision"]

    assert recorded() == (COMMIT, COMMIT)
    page = (next((run / "ckpts").iterdir()) / "README.md").read_text()
    assert page.count(COMMIT) == 2  # in the configuration
    for refs in (workplace / "cache").rglob("refs/main"):
        refs.write_text(LATER)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for more in (["--check"], []):
        capsys.readouterr()
        assert train.main(["--resume_ckpt", "findlast", *more]) == 0
        assert "revision: " not in capsys.readouterr().out
    assert recorded() == (COMMIT, COMMIT)
    capsys.readouterr()
    assert train.main(["--check"]) == 0  # a new run takes the main branch
    assert "vae: someone/vae is not in the hub cache" in capsys.readouterr().out


def test_a_revision_that_there_is_not_and_one_of_a_folder_are_refused(hub, workplace, capsys):
    hub.repositories["someone/some-model"] = write_tiny_folder(workplace / "served")
    write(workplace, ADAMW, model="someone/some-model", fixed_loss_images=0)
    assert train.main(["--revision", "v9"]) == 2
    assert "revision: someone/some-model on the hub has no such revision" in capsys.readouterr().err
    assert train.main(["--revision", "v9", "--resume_ckpt", "served"]) == 2
    assert "is a file or folder, and only models on the hub have revisions" in capsys.readouterr().err
    more = ["--ema_decay_rate", "0.5", "--ema_resume_model", "someone/some-model"]
    assert train.main([*more, "--ema_resume_revision", "v9"]) == 2
    assert "ema_resume_revision: someone/some-model on the hub has no such" in capsys.readouterr().err
    assert train.main(["--vae", "someone/some-model", "--vae_revision", "v9"]) == 2
    assert "vae_revision: someone/some-model on the hub has no such revision" in capsys.readouterr().err
    assert train.main(["--vae", "served", "--vae_revision", "v9", "--ema_resume_revision", "v9"]) == 2
    told = capsys.readouterr().err
    for key, model in (("vae_revision", "vae"), ("ema_resume_revision", "ema_resume_model")):
        assert f"--{key}: {model} is not on the hub, and only models there have revisions" in told


def test_a_repository_with_half_precision_only_loads(hub, tmp_path):
    hub.repositories["someone/half"] = write_tiny_folder(
        tmp_path / "served", dtype=torch.float16, variant="fp16"
    )
    reference = tiny_models()
    for network in NETWORKS:
        torch.nn.Module.to(getattr(reference, network), torch.float16).float()
    assert_same(load("someone/half"), reference)


@pytest.mark.parametrize("form", ["vae alone", "whole model"])
def test_a_vae_comes_from_the_hub_without_the_rest(form, hub, tmp_path):
    served = write_tiny_folder(tmp_path / "served", seed=1)
    hub.repositories["someone/vae"] = served / "vae" if form == "vae alone" else served
    base = write_tiny_folder(tmp_path / "base")
    options = ModelOptions(resume_ckpt=str(base), vae="someone/vae")
    assert "someone/vae" in describe(options).notes[0]
    models = load_models(options)
    assert_same(models, tiny_models(1), ("vae",))
    assert_same(models, tiny_models(), ("unet", "text_encoder"))
    assert not any("unet" in name or "text_encoder" in name for name in hub.sent)
    assert describe(options).notes == ()


def test_a_download_that_broke_off_goes_on(hub, tmp_path):
    folder = write_tiny_folder(tmp_path / "served")
    hub.repositories["someone/some-model"] = folder
    load("someone/some-model")
    cache = tmp_path / "cache" / "models--someone--some-model"
    weights = next(cache.glob("snapshots/*/unet/*.safetensors"))
    weights.resolve().unlink()
    weights.unlink()
    hub.sent.clear()
    assert_same(load("someone/some-model"), tiny_models())
    assert hub.sent == ["unet/diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        (
            "model_index.json",
            {
                "_class_name": "StableDiffusionXLPipeline",
                "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
            },
            "resume_ckpt: someone/other is a StableDiffusionXLPipeline, which this program does not train",
        ),
        ("unet/config.json", {"in_channels": 9}, "resume_ckpt: someone/other: the UNet takes 9 channels"),
    ],
)
@pytest.mark.parametrize("read", [describe, load_models])
def test_another_kind_of_model_is_refused_before_its_weights_are_downloaded(
    read, file, changes, said, hub, tmp_path
):
    served = hub.repositories["someone/other"] = write_tiny_folder(tmp_path / "served")
    (served / file).write_text(json.dumps(json.loads((served / file).read_text()) | changes))
    with pytest.raises(UserError, match=said):
        read(ModelOptions(resume_ckpt="someone/other"))
    assert {Path(name).suffix for name in hub.sent} == {".json"}


def test_what_the_hub_refuses_is_said_plainly(hub, tmp_path):
    for name, said in (
        ("someone/nothing", "the hub knows no model someone/nothing (or it is private: run `hf auth login`)"),
        ("someone/gated", "someone/gated on the hub asks for consent: accept its terms"),
    ):
        with pytest.raises(UserError) as caught:
            load(name)
        assert said in str(caught.value) and "path of a local diffusers folder" in str(caught.value)

    served = write_tiny_folder(tmp_path / "served")
    hub.repositories["someone/lora"] = tmp_path / "lora"
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "lora.safetensors").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"someone/lora on the hub is no diffusers model: it holds no model_index.json"
    ):
        load("someone/lora")
    with pytest.raises(UserError, match=r"vae: someone/lora on the hub holds no VAE"):
        load(str(served), vae="someone/lora")
    shutil.copytree(served, tmp_path / "part")
    (tmp_path / "part" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    hub.repositories["someone/part"] = tmp_path / "part"
    with pytest.raises(UserError, match=r"someone/part on the hub holds no weights of the unet"):
        load("someone/part")

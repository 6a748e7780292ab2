"""What data, recipes and checkpoints of others must not do: run code, reach for other files, or open connections."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from evs_train import strict
from evs_train.config import ModelSection
from evs_train.data import decode_pyav, readers
from evs_train.data.decoding import DECODER, Backend, Decoding
from evs_train.data.manifest import read_data
from evs_train.data.media_files import locate
from evs_train.data.sampling import FrameSampling
from evs_train.data.template import render
from evs_train.data.video import read_image, read_video
from evs_train.data_config import DataSection
from evs_train.errors import DataError, EvsTrainError, MediaError, ModelError, RecipeError
from evs_train.export import _trained_model
from evs_train.inputs import deepspeed_file
from evs_train.models.loading import load_config, load_family, load_weights
from evs_train.recipe import parse_yaml
from evs_train.uptrain import Run
from tests.conftest import write_noise
from tests.runs import ROOT, arguments, recipe_of

TURNS = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return (os.mkdir, (str(self.mark),))


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "code-was-run"


def plant(path: Path, mark: Path) -> None:
    torch.save({"state": Planted(mark)}, path)


# Code in checkpoints.


def test_a_planted_pickle_would_run(tmp_path: Path, mark: Path) -> None:
    """Or the tests below would show nothing."""
    plant(tmp_path / "x.pt", mark)
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert mark.exists()


def test_a_resumed_checkpoint_runs_no_code(
    tiny_checkpoint: Callable[[str], Path], world: Path, tmp_path: Path, mark: Path
) -> None:
    """transformers' own readers of a checkpoint, whatever else has checked it before."""
    words = arguments(tiny_checkpoint("qwen3_vl"), world, tmp_path / "run", train__steps=1, tuning__method="lora")
    trainer = Run(recipe_of(words)).build_trainer()
    trainer.create_optimizer_and_scheduler(1)
    for name, read in {
        "optimizer.pt": trainer._load_optimizer_and_scheduler,
        "scheduler.pt": trainer._load_optimizer_and_scheduler,
        "rng_state.pth": trainer._load_rng_state,
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        torch.save(trainer.optimizer.state_dict(), folder / "optimizer.pt")
        torch.save(trainer.lr_scheduler.state_dict(), folder / "scheduler.pt")
        plant(folder / name, mark)
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            read(str(folder))
    folder = tmp_path / "adapter"
    trainer.model.save_pretrained(folder)
    (folder / "adapter_model.safetensors").unlink()
    plant(folder / "adapter_model.bin", mark)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer._load_from_checkpoint(str(folder))
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        _trained_model(recipe_of(words), folder, tiny_checkpoint("qwen3_vl"))
    assert not mark.exists()


def test_weights_are_read_from_safetensors_alone(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, mark: Path
) -> None:
    for file in tiny_checkpoint("qwen3_vl").iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).symlink_to(file)
    plant(tmp_path / "pytorch_model.bin", mark)
    with pytest.raises(ModelError, match=r"cannot be loaded: .*safetensors"):
        load_weights(ModelSection(path=str(tmp_path)), load_config(str(tmp_path)), torch.float32)
    assert not mark.exists()


@pytest.mark.parametrize("place", ["attn_implementation", "text_config"])
def test_kernels_of_a_repository_are_refused(
    tiny_checkpoint: Callable[[str], Path], tmp_path: Path, place: str
) -> None:
    config = json.loads((tiny_checkpoint("qwen3_vl") / "config.json").read_text())
    nested = config if place == "attn_implementation" else config[place]
    nested["attn_implementation"] = "somebody/kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="takes code from a repository: attn_implementation: somebody/kernel"):
        load_config(str(tmp_path))
    with pytest.raises(RecipeError, match=r"model\.attn_implementation"):
        recipe_of(["recipe=tiny", "model.attn_implementation=somebody/kernel"])


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.mkdir('MARK') }}",
        "{{ self._TemplateReference__context }}{{ (namespace.__init__ | attr('__globals__'))['os'].mkdir('MARK') }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{% include '/etc/passwd' %}",
        "{{ 1 / 0 }}",
    ],
)
def test_chat_templates_run_in_a_sandbox(tiny_checkpoint: Callable[[str], Path], mark: Path, template: str) -> None:
    family = load_family(ModelSection(path=str(tiny_checkpoint("qwen3_vl"))), DataSection(rows=["x"]))
    family.processor.chat_template = template.replace("MARK", str(mark))
    with pytest.raises(DataError, match="the chat template refuses the conversation"):
        render(family, [{"role": "user", "content": "hello"}], {}, "row 1")
    assert not mark.exists()


# Code in data.


def test_an_extension_type_in_a_table_runs_no_code(tmp_path: Path, mark: Path) -> None:
    """pyarrow once unpickled these on sight (CVE-2023-47248)."""
    metadata = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Planted(mark)),
    }
    schema = pyarrow.schema(
        [pyarrow.field("caption", pyarrow.string(), metadata=metadata), ("video", pyarrow.string())]
    )
    table = pyarrow.table([["A cat."], ["gone.mp4"]], schema=schema)
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pyarrow.OSFile(str(tmp_path / "rows.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:
        writer.write_table(table)
    for name in ("rows.parquet", "rows.arrow"):
        with pytest.raises(EvsTrainError):
            read_data(DataSection(rows=[str(tmp_path / name)]))
    assert not mark.exists()


def test_a_table_that_unpacks_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"caption": ["a" * (8 << 20)]}), file, compression="zstd", use_dictionary=False)
    assert file.stat().st_size < 10_000
    monkeypatch.setattr(readers, "MOST_UNPACKED", 1 << 20)
    with pytest.raises(DataError, match="unpacks to"):
        read_data(DataSection(rows=[str(file)]))


BILLION = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 10))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("!!python/object/apply:os.mkdir [MARK]", "could not determine a constructor"),
        ("!!python/name:os.system x", "could not determine a constructor"),
        ("{a: 1, a: 2}", "given twice"),
        ("{a: &a [1, *a]}", "stands for what it lies in"),
        ("[" * 1200, "nested too deeply"),
        ('{a: "\\ud800"}', "surrogate"),
        ('{a: "\\0"}', "NUL"),
        ("{a: 2026-01-01}", "is a date; put it in quotes"),
        ("{2026-01-01: a}", "is a date; put it in quotes"),
        ("{? [1] : a}", "unhashable|found"),
        (BILLION, "unfold"),
    ],
)
def test_yaml_is_data(text: str, reason: str, mark: Path) -> None:
    with pytest.raises(RecipeError, match=reason):
        parse_yaml(text.replace("MARK", str(mark)), "recipe.yaml")
    assert not mark.exists()


TWICE = '{"video": "a.mp4", "video": "b.mp4", "conversations": []}'


def test_a_key_given_twice_is_refused_wherever_json_is_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "rows.tar", "w") as tar:
        member = tarfile.TarInfo("a.json")
        member.size = len(TWICE)
        tar.addfile(member, io.BytesIO(TWICE.encode()))
    for name, text in {"rows.jsonl": TWICE, "rows.json": f"[{TWICE}]", "zero.json": '{"a": {"b": 1, "b": 2}}'}.items():
        (tmp_path / name).write_text(text)
    for name in ("rows.jsonl", "rows.json", "rows.tar"):
        with pytest.raises(DataError, match="the key 'video' is given twice"):
            read_data(DataSection(rows=[str(tmp_path / name)]))
    with pytest.raises(RecipeError, match="the key 'b' is given twice"):
        deepspeed_file(str(tmp_path / "zero.json"))


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "9" * 5000, "[" * 5000, '"\\ud800"', '{"\\uDfff": 1}'])
def test_json_that_python_reads_and_others_do_not(text: str) -> None:
    with pytest.raises(strict.StrictError):
        strict.read_json(text)


# Other files and connections.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A media root with links out of it, beside files that are not in it."""
    root = tmp_path / "root"
    (root / "frames").mkdir(parents=True)
    write_noise(root / "clip.mp4", 4)
    write_noise(tmp_path / "outside.mp4", 4)
    Image.new("RGB", (8, 8)).save(tmp_path / "outside.png")
    (root / "link.mp4").symlink_to(tmp_path / "outside.mp4")
    (root / "frames" / "1.png").symlink_to(tmp_path / "outside.png")
    (root / "folder").symlink_to(tmp_path)
    return root


@pytest.mark.parametrize(
    "video",
    [
        "../outside.mp4", "frames/../../outside.mp4", "OUT/outside.mp4", "file://OUT/outside.mp4", "link.mp4", "frames",
        "folder/outside.mp4", ["../outside.png"], ["frames/1.png"], "http://127.0.0.1/x.mp4", "https://x/y.mp4",
        "concat:clip.mp4|OUT/outside.mp4", "file:OUT/outside.mp4", "subfile,,start,0,end,9,,:OUT/outside.mp4",
        "data:video/mp4;base64,AAAA", "crypto:OUT/outside.mp4", "tcp://127.0.0.1:1", "pipe:0", "rtsp://127.0.0.1/x",
        "clip.mp4\0.png", "/proc/self/fd/0", {"path": "../outside.mp4", "bytes": None},
    ],
)  # fmt: skip
def test_rows_reach_nothing_outside_the_media_root(root: Path, video: Any) -> None:
    row = json.dumps({"video": [video] if isinstance(video, list) else video, "conversations": TURNS})
    (root / "rows.jsonl").write_text(row.replace("OUT", str(root.parent)))
    with pytest.raises((DataError, MediaError)):
        read_data(DataSection(rows=[str(root / "rows.jsonl")], media_root=str(root), frames_fps=2.0))


def test_a_listing_cannot_widen_the_recipes_media_root(root: Path) -> None:
    (root / "rows.jsonl").write_text(json.dumps({"video": "outside.mp4", "conversations": TURNS}))
    listing = root / "listing.yaml"
    listing.write_text("datasets: [{json_path: rows.jsonl, media_root: ..}]")
    with pytest.raises(DataError, match=r"entry 1: its media_root lies outside data\.media_root"):
        read_data(DataSection(rows=[str(listing)], media_root=str(root)))
    allowed = DataSection(rows=[str(listing)], media_root=str(root), allow_outside=True)
    assert len(read_data(allowed).samples) == 1


def posing(folder: Path, kind: str, name: str) -> Path:
    """A file called like a video that makes FFmpeg open `outside.ts`, or a connection."""
    outside = folder / "outside.ts"
    write_noise(folder / "source.mp4", 10)
    with av.open(str(folder / "source.mp4")) as source, av.open(str(outside), "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    text = {
        "hls": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{outside}\n#EXT-X-ENDLIST\n",
        "concat": "ffconcat version 1.0\nfile outside.ts\n",
        "sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5555 RTP/AVP 96\n",
    }[kind]
    path = folder / name
    path.write_text(text)
    return path


@pytest.mark.parametrize("backend", ["auto", "decord"])
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("hls", "a.m3u8"),
        ("hls", "a.mp4"),
        ("concat", "a.mp4"),
        ("concat", "a.ffconcat"),
        ("sdp", "a.mp4"),
        ("sdp", "a.sdp"),
    ],
)
def test_a_file_that_leads_to_others_is_not_opened(tmp_path: Path, kind: str, name: str, backend: Backend) -> None:
    """Nor if an index that came with the data says that decord reads it."""
    path, decoding = posing(tmp_path, kind, name), Decoding(backend=backend, timeout=20.0)
    for verify, suits_decord in ((True, False), (False, True)):
        with pytest.raises(MediaError) as caught:
            read_video(
                str(path), FrameSampling(num_frames=4), verify=verify, suits_decord=suits_decord, decoding=decoding
            )
        assert caught.value.reason == "not a video", str(caught.value)


def test_without_the_list_of_formats_it_would_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = locate(str(posing(tmp_path, "concat", "a.mp4")), "video")
    with pytest.raises(MediaError, match="such as a playlist"):
        decode_pyav.open_video(file)
    monkeypatch.setattr(decode_pyav, "FORMATS", (*decode_pyav.FORMATS, "concat"))
    with decode_pyav.open_video(file) as container:
        assert container.format.name == "concat"


def test_an_image_that_is_a_program_is_not_run(tmp_path: Path, mark: Path) -> None:
    """PIL hands Encapsulated PostScript to Ghostscript, whatever the file is called."""
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "EPS")
    (tmp_path / "a.jpg").write_bytes(buffer.getvalue())
    with Image.open(tmp_path / "a.jpg") as found:
        assert found.format == "EPS"
    with pytest.raises(MediaError) as caught:
        read_image(str(tmp_path / "a.jpg"))
    assert caught.value.reason == "not an image"


# Our own code.

_UNSAFE = {"eval", "exec", "__import__", "import_module", "system", "popen", "unsafe_load", "full_load"}


def calls(text: str) -> list[tuple[str, ast.Call]]:
    found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def unsafe(name: str, call: ast.Call) -> bool:
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    if name == "torch.load":
        return given.get("weights_only") != "True"
    if name == "yaml.load":
        return given.get("Loader") != "_Loader"
    if name in ("pickle.load", "pickle.loads", "np.load"):
        return True
    return (name.rpartition(".")[2] in _UNSAFE and name not in ("plain.eval", "layer.eval")) or given.get(
        "shell"
    ) == "True"


def test_our_own_code_loads_nothing_that_could_run() -> None:
    examples = "torch.load(x)\nyaml.load(x)\neval(x)\npickle.load(x)\ntorch.load(x, weights_only=True)"
    assert [unsafe(name, call) for name, call in calls(examples)] == [True, True, True, True, False]
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*ROOT.glob("evs_train/**/*.py"), *ROOT.glob("launch/**/*.py")]
        for name, call in calls(path.read_text(encoding="utf-8"))
        if unsafe(name, call) and not name.endswith((".eval().to",))
    ]
    # What a process wrote for itself, what its parent sent, and names in a table of our own.
    assert sorted(found) == [
        "evs_train/data/decode_worker.py: pickle.loads",
        "evs_train/data/manifest.py: pickle.loads",
        "evs_train/pruners/__init__.py: importlib.import_module",
    ]


@pytest.fixture(autouse=True, scope="module")
def _end_decoder() -> Any:
    yield
    DECODER.close()

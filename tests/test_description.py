"""What a run was: in its files, in TensorBoard and in its report; and what it does not say."""

from __future__ import annotations

import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import torchprobe
from torchprobe import description
from torchprobe.description import HIDDEN, git_state, hidden_options
from torchprobe.reports.run import read_run
from torchprobe.reports.summary import summarise


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 1).bfloat16()
        self.body[0].requires_grad_(False)
        self.tied = self.head
        self.lazy = nn.LazyLinear(2)

    def forward(self, x):
        return self.head(self.body(x).bfloat16())


def record(log_dir, **options):
    model = Net()
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.1)
    with torchprobe.instrument(model, log_dir=log_dir, probes=[torchprobe.Loss()], **options):
        model(torch.ones(2, 3)).float().sum().backward()
        optimizer.step()
    return summarise(read_run(log_dir))["description"]


def git(place, *arguments):
    names = ["-c", "user.name=A", "-c", "user.email=a@b"]
    subprocess.run(["git", *names, *arguments], cwd=place, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "train.py").write_text("pass")
    git(tmp_path, "add", "train.py")
    git(tmp_path, "commit", "-m", "first")
    return tmp_path


def test_the_model_is_described(tmp_path):
    facts = record(tmp_path)
    assert facts["model"] == "Net"
    assert facts["parameters"] == {"trained": 5, "frozen": 16}
    assert (facts["devices"], facts["precision"], facts["ranks"]) == (["cpu"], ["bfloat16", "float32"], 1)
    tree = {module["name"]: module for module in facts["modules"]}
    assert list(tree) == ["root", "body", "body.0", "body.1", "head", "lazy"]
    assert tree["body.0"] == {"name": "body.0", "class": "Linear", "shapes": {"weight": [4, 3], "bias": [4]}}
    assert tree["lazy"]["shapes"] == {"weight": None, "bias": None}


@pytest.mark.parametrize("argv", [None, [], [None, 3], [b"x"]])
def test_a_program_without_a_command_line_is_watched(tmp_path, monkeypatch, argv):
    monkeypatch.setattr(sys, "argv", argv)
    if argv is None:
        monkeypatch.delattr(sys, "argv")
    facts = record(tmp_path)
    words = [str(word) for word in argv or ()]
    assert (facts["script"], facts["options"]) == (words[0] if words else "", words[1:])


def test_versions_script_options_and_hparams(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/some/where/train.py", "--lr", "-1e-3", "--api-key=abc", "--token", "t0p", "x"])
    facts = record(tmp_path, hparams={"lr": 0.1, "wandb_token": "t0p", "note": "a", "limit": math.inf})
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["versions"]["torchprobe"] == torchprobe.__version__
    assert (facts["script"], facts["options"]) == (
        "train.py",
        ["--lr", "-1e-3", f"--api-key={HIDDEN}", "--token", HIDDEN, HIDDEN],
    )
    assert facts["hparams"] == {"lr": 0.1, "wandb_token": HIDDEN, "note": "a", "limit": "inf"}


def test_the_same_is_on_the_text_page(tmp_path):
    record(tmp_path)
    (_, page), *others = read_run(tmp_path).texts["torchprobe/run"]
    assert not others
    assert "| parameters | `5 trained, 16 frozen` |" in page
    assert "  body: Sequential\n    0: Linear (weight (4, 3), bias (4,))" in page


def test_the_commit_and_whether_files_were_changed(repository, monkeypatch):
    monkeypatch.chdir(repository)
    clean = record(repository / "run")["git"]
    head = (repository / ".git" / "HEAD").read_text().split()[1]
    assert clean == {"commit": (repository / ".git" / head).read_text().strip(), "dirty": False}
    (repository / "train.py").write_text("pass  # changed")
    assert record(repository / "run_b")["git"] == {**clean, "dirty": True}


def test_git_is_not_asked_on_the_training_thread(tmp_path, monkeypatch):
    threads = []
    monkeypatch.setattr(description, "git_state", lambda places: threads.append(threading.current_thread()))
    record(tmp_path)
    assert len(threads) == 1
    assert threads[0] is not threading.main_thread()


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError, subprocess.TimeoutExpired])
def test_without_git_nothing_is_said_of_it(error, monkeypatch):
    def run(*arguments, **options):
        raise error("git", 5) if error is subprocess.TimeoutExpired else error()

    monkeypatch.setattr(subprocess, "run", run)
    assert git_state([Path.cwd()]) is None


def test_a_folder_that_is_in_no_repository(tmp_path):
    assert git_state([tmp_path, tmp_path / "nowhere"]) is None


SECRETS = {
    "--password=a": f"--password={HIDDEN}",
    "hf.token=abc": f"hf.token={HIDDEN}",
    "OPENAI_API_KEY=abc": f"OPENAI_API_KEY={HIDDEN}",
    '{"secret": "a b", "lr": 1}': f'{{"secret": {HIDDEN}, "lr": 1}}',
    "s3://user:pw@host.org/data": f"s3://{HIDDEN}@host.org/data",
    "https://h.org/x?a=1&access_token=abc": f"https://h.org/x?a=1&access_token={HIDDEN}",
    "/home/alice/data": "~/data",
    "data=/Users/bob/x": "data=~/x",
    f"{Path.home()}/x": "~/x",
    "--lr=1e-3": "--lr=1e-3",
    "tokenizer=gpt2": "tokenizer=gpt2",
}


@pytest.mark.parametrize("option", SECRETS)
def test_what_an_option_hides(option):
    assert list(hidden_options([option])) == [SECRETS[option]]


def test_the_names_of_user_and_host_are_hidden(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    monkeypatch.setattr("socket.gethostname", lambda: "node17")
    assert list(hidden_options(["--out=/scratch/alice/x", "tcp://node17:80", "malice"])) == [
        f"--out=/scratch/{HIDDEN}/x",
        f"tcp://{HIDDEN}:80",
        "malice",
    ]


@given(
    before=st.sampled_from(["--", "-"]),
    name=st.sampled_from(["key", "api_key", "auth.token", "Password", "client-secret", "tokens"]),
    form=st.sampled_from(["{0} {1}", "{0}={1}", "{0} {1} {1}"]),
    value=st.text("abcXYZ019_", min_size=4, max_size=12).map(lambda text: f"S3CR{text}"),
)
def test_no_value_of_a_secret_option_is_left(before, name, form, value):
    options = [*form.format(before + name, value).split(), "--lr", "0.1"]
    found = list(hidden_options(options))
    assert value not in " ".join(found)
    assert found[-2:] == ["--lr", "0.1"]

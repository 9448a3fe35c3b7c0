import sys
import time

import pytest

from customize.training.progress import Progress
from customize.training.recipe import train
from tests.tiny import tiny_sd
from tests.training.runs import settings


class Terminal:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text
        return len(text)

    def flush(self):
        pass

    def isatty(self):
        return True


class Gone(Terminal):
    def write(self, text):
        raise BrokenPipeError


@pytest.mark.usefixtures("quick_recordings")
def test_each_phase_has_a_line_in_a_log_file(tmp_path, capsys):
    changes = {"num_shared_directions": 4, "record_inputs": True, "samples": True}
    changes |= {"prior_weight": 1.0, "prior_count": 2, "validation_steps": 1, "steps": 20}
    train(settings(tmp_path, rank=2, **changes), tiny_sd().components)
    out, err = capsys.readouterr()
    assert "\r" not in err and all(" [00:" in line for line in err.splitlines())
    for phase in (
        *("images ", "captions ", "recording the directions that all"),
        *("drawing class images: 1/1", "encoding images: 5/5", "encoding prompts"),
        *("drawing the first samples", "learning: 20/20", "measuring", "saving rex"),
        *("recording the layer inputs of rex", "loss on fixed noise"),
    ):
        assert phase in out + err, phase
    assert len((out + err).splitlines()) < 50  # not one a step
    train(settings(tmp_path, "silent"), tiny_sd().components, progress=False)
    assert capsys.readouterr() == ("", "")


def test_bars_are_redrawn_on_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setattr(sys, "stdout", Terminal())
    progress = Progress(True)
    assert list(progress.track([1, 2, 3], "counting")) == [1, 2, 3]
    with progress.phase("waiting"), progress.phase("at once", after=60.0):
        pass
    with progress.phase("slow", after=0.01):
        time.sleep(0.2)
    assert "\r" in sys.stderr.text and "counting" in sys.stderr.text
    assert "waiting ...\n" in sys.stdout.text and "slow ...\n" in sys.stdout.text
    assert "at once" not in sys.stdout.text


def test_a_closed_terminal_raises_no_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(sys, "stdout", Gone())
    monkeypatch.setattr(Gone, "isatty", lambda self: False)
    progress = Progress(True)
    assert list(progress.track([1, 2], "counting")) == [1, 2]
    progress.line("x")


def test_other_processes_show_nothing(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    Progress(True).line("x")
    assert capsys.readouterr() == ("", "")

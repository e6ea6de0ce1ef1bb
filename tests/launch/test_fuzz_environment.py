"""A short form of the fuzzer over environments (tests/fuzz/environment.py)."""

import environment
import pytest


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return environment.Fuzzer(tmp_path_factory.mktemp("fuzz"))


# One case of each command, with what was once a traceback, a lost result or a hang.
ODD = {
    "train": ("restarts", "a local rank alone"),
    "train on two ranks": ("HOME", "umask"),
    "torchrun": ("file size", "a taken port"),
    "sweep": ("TZ", "columns"),
    "generate": ("console's encoding", "locale"),
    "evaluate": ("columns", "TMPDIR"),
    "checkpoint": ("stdout", "no colours"),
    "report": ("stdout", "matplotlib's folder"),
    "export": ("stderr", "user"),
    "help": ("stdout", "working directory"),
}


@pytest.mark.parametrize("command", ODD)
def test_an_odd_environment_gives_the_same_result_or_a_message(fuzzer, command):
    number = list(environment.COMMANDS).index(command)
    verdict = fuzzer.case(number, seed=14, odd=ODD[command])
    assert verdict.result in (environment.FINE, environment.REFUSED), verdict


def test_the_judge_sees_what_is_broken(fuzzer):
    setting = environment.Setting(None, fuzzer.folder, {}, [f"run_dir={fuzzer.run_dir}"])
    judged = [
        fuzzer.judge("train", setting, code, "", error)[0]
        for code, error in ((0, ""), (1, ""), (1, "said"), (1, "Traceback"), (environment.HANG, ""))
    ]
    assert judged == ["fine", "silent", "different", "traceback", "hang"]
    fuzzer.losses[0] += 1e-6
    assert fuzzer.judge("train", setting, 0, "", "")[0] == "different"
    assert fuzzer.judge("evaluate", setting, 0, "another", "")[0] == "different"

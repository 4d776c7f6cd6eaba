"""The model that ships with the code: a newcomer without a checkpoint or a network sees
a digit go, and the others stay as they were."""

import shutil

import pytest

from test_command_lines import command, past, report_of


@pytest.fixture
def shipped(beside):
    return beside["shipped"]  # conftest.py types the first two commands


def test_the_shipped_model_forgets_a_digit(shipped):
    folder, (function_space, two_terms) = shipped[0], shipped[1].result(timeout=400)
    assert "ships with the code" in function_space and "still there" not in function_space
    assert "still there" in two_terms
    record = past(folder / "checkpoints/mnist-forget-1.pt")
    assert record["rho"] == pytest.approx(6742 / 60000) and record["images"] == 500
    assert record["like_D_f"][0][1] > 0.05 > 0.01 > record["like_D_f"][-1][1]
    for classifier in folder.parent.glob("run*/checkpoints/classifier-mnist-*"):
        shutil.copy(classifier, folder / "checkpoints")  # trained on the same images
    command("evaluate.py --after checkpoints/mnist-forget-1.pt two-terms.pt --samples 300 "
            "--sampling-steps 10 --bits 10", folder)
    space, terms = (report_of(folder / "results" / name) for name in ("mnist-forget-1",
                                                                           "two-terms"))
    assert space["PUL"] >= 90 and space["drift"] <= 0.2 and space["recognisable"]
    assert terms["after"]["forgotten_count"] < terms["before"]["forgotten_count"]
    assert space["after"]["bits_forgotten"] > space["before"]["bits_forgotten"]

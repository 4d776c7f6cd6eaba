"""The model that ships with the code: a newcomer without a checkpoint or a network sees
a digit go, and the others stay as they were."""

import json

import pytest

import ddpm


@pytest.fixture
def shipped(beside):
    """(folder, outputs): conftest.py typed the commands there, one after the other."""
    folder, outputs = beside["shipped"]
    return folder, outputs.result(timeout=400)


def test_the_shipped_model_forgets_a_digit(shipped):
    folder, (function_space, two_terms, _) = shipped
    assert "ships with the code" in function_space and "still there" not in function_space
    assert "still there" in two_terms
    record = ddpm.load_checkpoint(folder / "checkpoints/mnist-forget-1.pt").forgotten
    assert record["rho"] == pytest.approx(6742 / 60000) and record["images"] == 500
    assert record["like_D_f"][0][1] > 0.05 > 0.01 > record["like_D_f"][-1][1]
    space, terms = (json.loads((folder / f"results/{name}/report.json").read_text())
                    for name in ("mnist-forget-1", "two-terms"))
    assert space["PUL"] >= 90 and space["drift"] <= 0.15
    assert terms["after"]["forgotten_count"] < terms["before"]["forgotten_count"]
    assert space["after"]["bits_forgotten"] > space["before"]["bits_forgotten"]

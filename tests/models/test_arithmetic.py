import threading

import pytest
import torch

from regvit.models.arithmetic import arithmetic

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "products", "autocast"),
    [("float32", "highest", None), ("float32_medium", "medium", None), ("bfloat16", "highest", torch.bfloat16)],
)
def test_the_name_sets_the_arithmetic_inside_the_block_only(precision, products, autocast):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with pytest.raises(ZeroDivisionError), arithmetic(precision, CPU):
        assert torch.get_float32_matmul_precision() == products
        assert torch.backends.cudnn.allow_tf32 == (precision == "float32_medium")
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (autocast or torch.float32)
        _ = 1 / 0  # an error puts it back too
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before
    assert not torch.is_autocast_enabled("cpu")


def test_threads_take_turns_and_a_block_may_hold_another():
    seen, inside, leave = [], threading.Event(), threading.Event()

    def other():
        with arithmetic("float32_medium", CPU), arithmetic("float32_medium", CPU):
            inside.set()
            leave.wait(10)
            seen.append(torch.get_float32_matmul_precision())

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(10)
    threading.Timer(0.2, leave.set).start()
    with arithmetic("float32", CPU):
        assert seen == ["medium"]  # it has left, and was not disturbed
        assert torch.get_float32_matmul_precision() == "highest"
    thread.join()


def test_a_name_that_stands_for_nothing_is_refused():
    with pytest.raises(ValueError, match="precision is 'half'; expected one of"), arithmetic("half", CPU):
        pass


@pytest.mark.parametrize(
    ("instructions", "precision", "slow"),
    [("AVX2", "bfloat16", True), ("AVX2", "float32", False), ("AVX512", "bfloat16", False)],
)
def test_emulated_half_types_are_named(monkeypatch, recwarn, instructions, precision, slow):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: instructions)
    with arithmetic(precision, CPU):
        pass
    assert [
        str(one.message).startswith("this processor (AVX2) has no instructions for bfloat16") for one in recwarn
    ] == [True] * slow

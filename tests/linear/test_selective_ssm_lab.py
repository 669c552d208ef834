"""The selective-scan lab's experiment: what is asked, and what a reader that knows nothing would answer."""

import pytest
import torch

from effattn_lab.figures import selective_ssm_lab as lab
from effattn_lab.linear.selective_ssm_layer import Mamba

TEXT = torch.tensor([list(b"ab The cat. A dog ran. The end, The End")])


def test_capitals():
    want, age = lab.capitals(TEXT)
    assert want[0, :4].tolist() == [-100, -100, -100, ord("T") - 65]
    assert age[0, 3:6].tolist() == [0, 1, 2]
    assert want[0, -1] == ord("E") - 65


def test_commonest_is_a_reader_that_answers_one_letter():
    """The same shares as `recall` gives a reader whose scores never change."""
    torch.manual_seed(0)
    reader = lab.Reader(Mamba(8, state_size=2, conv_width=1))
    with torch.no_grad():
        reader.head.weight.zero_()
        reader.head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(ord("T") - 65), lab.LETTERS))
    found = lab.commonest(TEXT, (0, 4, 16))
    assert found == pytest.approx(lab.recall(reader, TEXT, (0, 4, 16)))
    assert 0 < found[0] < 1


def test_the_picture_is_drawn():
    share = torch.rand(6, 13, generator=torch.Generator().manual_seed(0))
    figure = lab.steps_picture("A cat. B dog.", share)
    assert len(figure.axes) == 3
    assert "channels" in figure.axes[0].get_ylabel()

from __future__ import annotations

import numpy as np
import pytest

from powerhouse.errors import InputError
from powerhouse.prompting import Verbalizer, calibrate

WORDS = {"positive": ["happy", "great"], "negative": ["sad"]}


def test_a_label_has_the_probability_of_its_words_among_all_words() -> None:
    probabilities = np.array([0.1, 0.3, 0.2])

    of_labels = Verbalizer(WORDS).probabilities(np.log(probabilities))

    np.testing.assert_allclose(of_labels, [0.4 / 0.6, 0.2 / 0.6], rtol=1e-15)


def test_probabilities_are_finite_where_words_are_very_unlikely() -> None:
    np.testing.assert_allclose(Verbalizer(WORDS).probabilities([-1e4, -1e4 - 1, -1e4]), [0.577681, 0.422319], rtol=1e-5)


def test_the_first_word_of_a_label_says_it_in_an_example() -> None:
    verbalizer = Verbalizer(WORDS)

    assert (verbalizer.word_of("positive"), verbalizer.index_of("negative")) == ("happy", 1)
    with pytest.raises(InputError, match=r"no word for\n  got: 'neutral'\n  allowed: positive, negative"):
        verbalizer.word_of("neutral")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"positive": ["good"]}, "tells labels apart"),
        ({"positive": ["good"], "negative": []}, "a label without a word"),
        ({"positive": ["good"], "negative": ["bad", " "]}, "a label without a word"),
        ({"positive": ["good"], "negative": ["good"]}, "a word stands for a label once"),
    ],
)
def test_words_that_cannot_tell_labels_apart_are_refused(words: dict[str, list[str]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Verbalizer(words)


def test_labels_that_share_a_first_token_and_words_that_contain_each_other_are_refused() -> None:
    verbalizer = Verbalizer(WORDS)

    verbalizer.check_tokens([[1], [2, 3], [4]])
    verbalizer.check_tokens([[1, 2], [1, 3], [4]])
    with pytest.raises(InputError, match=r"share a first token .*\n  got: 'great' \(positive\) and 'sad' \(negative\)"):
        verbalizer.check_tokens([[1], [4, 3], [4, 5]])
    with pytest.raises(InputError, match=r"begins with another one.*\n  got: 'happy' \(positive\) and 'great' \(positive\)"):
        verbalizer.check_tokens([[1], [1, 3], [4]])


def test_calibration_makes_an_answer_without_content_uniform() -> None:
    content_free = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1]])

    np.testing.assert_allclose(calibrate(content_free.mean(axis=0), content_free), np.full(3, 1 / 3), rtol=1e-15)


def test_calibration_is_the_worked_example_of_its_paper() -> None:
    """Zhao et al. 2021, section 4.4: "N/A" is 61.8 % positive, so an input must be above that to be called positive."""
    content_free = np.array([[0.618, 0.382]])

    for positive, is_positive in ((0.61, False), (0.63, True)):
        calibrated = calibrate(np.array([positive, 1 - positive]), content_free)
        np.testing.assert_allclose(calibrated.sum(), 1)
        assert (calibrated[0] > calibrated[1]) == is_positive

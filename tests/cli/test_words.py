from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from torchprobe.cli.corpus import PADDING, word_numbers, words_of


def test_identifiers_fall_apart_into_lower_case_words_and_punctuation_is_kept():
    assert words_of("self.assertEqual(HTTPServer, 42)") == [
        *("self", ".", "assert", "equal", "(", "http", "server", ",", "42", ")"),
    ]


def test_words_of_other_scripts_stay_whole():
    assert words_of("Привет, мир") == ["привет", ",", "мир"]


def test_rows_are_cut_and_filled_up_to_one_length():
    assert len(word_numbers("one two three four", length=3, vocabulary=100)) == 3
    assert word_numbers("one", length=3, vocabulary=100)[1:] == [PADDING, PADDING]


def test_the_same_word_has_the_same_number_in_every_process():
    assert word_numbers("loop", length=1, vocabulary=8192) == [2320]


@given(st.text(min_size=1), st.integers(1, 20), st.integers(2, 500))
def test_numbers_are_in_range_and_never_all_padding(text: str, length: int, vocabulary: int):
    numbers = word_numbers(text, length, vocabulary)
    assert len(numbers) == length
    assert all(0 <= number < vocabulary for number in numbers)
    assert numbers[0] != PADDING

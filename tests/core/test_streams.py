"""Random streams are part of stored results: these values must never change."""

import numpy as np

from embrm.core.streams import blake2b_number, generator, raw_words, sha256_key, stream


def test_a_stream_depends_on_its_name_alone() -> None:
    assert stream(0, "order", 3).integers(0, 1 << 32, 3).tolist() == [
        330956463,
        2028400021,
        4075347745,
    ]
    assert stream(0, "order", 4).random() != stream(0, "order", 3).random()
    assert stream(1, "order", 3).random() != stream(0, "order", 3).random()


def test_draws_of_one_stream_do_not_move_another() -> None:
    first, second = stream(0, "a"), stream(0, "b")
    first.random(1000)
    assert np.array_equal(second.random(5), stream(0, "b").random(5))


def test_the_keys_behind_stored_results_are_as_they_were() -> None:
    assert sha256_key("0/order/3", "little") == 261946907000563564659512059169959614795
    assert sha256_key("0/order/3", "big") == 100488312555518115267941882219020358085
    assert blake2b_number("name", 128) == 196678556432650138295681524524059442413
    assert blake2b_number("name", 64, "little", b"embrm") == 1980659075597801775
    assert raw_words(7).random_raw(2).tolist() == [16086915834549238692, 5448529601018347655]
    assert generator(7).poisson(1.0, 8).tolist() == [1, 1, 0, 1, 1, 2, 2, 1]

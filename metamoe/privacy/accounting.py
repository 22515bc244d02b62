"""How much noise a budget asks for: Opacus' accountant (PRV), asked in both directions.

A release is (noise multiplier, sample rate, steps): Gaussian noise of noise multiplier times what one record
can change at most, `steps` times, each time on a Poisson sample of this rate (1: on all records).
"""

import warnings


def spent_epsilon(releases, delta):
    """The epsilon at this delta of all releases together; an upper bound, at most 0.01 too high."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(float(noise), float(rate), int(steps)) for noise, rate, steps in releases]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of logarithms of 0, which it then leaves out
        return float(accountant.get_epsilon(delta))


def least_noise(releases, epsilon, delta):
    """The least scale s, within a thousandth, where releases(s) together stay within (epsilon, delta)."""
    low, high = 0.01, 1.0
    while spent_epsilon(releases(high), delta) > epsilon:
        low, high = high, 2 * high
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        if spent_epsilon(releases(middle), delta) > epsilon:
            low = middle
        else:
            high = middle
    return high

"""What measured quality decides: the smallest size within a bound, and which layers to fold.

`smallest` and `choose` begin a search; every candidate is compressed and evaluated, none guessed.
"""

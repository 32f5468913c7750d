"""What others may do to the product: a false instance, a hostile worker, foreign bytes.

Each test has a positive control: the same tool, used as it should be, is served.
"""

"""Property tests: every statistic and every operator against its definition, on inputs that Hypothesis chooses.

=====================  ==============================================================================================
``activations``        the inputs: shapes, strides, types, values, masks; one set for all tests
``arguments``          labels, maps and rankings, for the operators that read them
``histories``          what happens to a statistic: partitions, merge trees, saving and copying on the way
``definitions``        the right numbers, in extended precision, exact fractions or whole numbers
``tried``              counts the cases
``test_definitions``   the definitions themselves, against exact fractions
``test_statistics``    every statistic
``test_quantiles``     the statistics of ranks: quantiles, top inputs
``test_operators``     every operator
=====================  ==============================================================================================

``make properties`` tries at least 10,000 cases of each; ``make test`` a few.
"""

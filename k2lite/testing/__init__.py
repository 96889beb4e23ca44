"""The conformance suite that every backend must pass, of whatever package: `k2lite backends test NAME`, or in pytest

    from k2lite.testing.suite import conformance_cases

    @pytest.mark.parametrize("case", conformance_cases(), ids=str)
    def test_mine(case): case.run(MyBackend())

The oracle is float64 arithmetic of its own, which shares no code with backends/.
"""

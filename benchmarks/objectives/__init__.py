"""Each objective end to end on the shipped base: does what it trains rise?"""

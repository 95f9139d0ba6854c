"""The market's middle: it holds the auctions, matches what was done with what was received, and
keeps the ledger.  It never sees a prompt or an answer.
"""

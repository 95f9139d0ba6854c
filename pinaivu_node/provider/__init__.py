"""The seller: bids on jobs, runs them on its engines, streams tokens, signs what it did."""

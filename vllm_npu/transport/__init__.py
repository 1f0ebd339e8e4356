"""Moving tensors between ranks: the contract in base.py, a file for each wire, and table.py, which names them."""

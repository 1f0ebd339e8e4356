"""Communication between ranks: base.py has the contract, table.py lists the transports, each other file has one of them."""

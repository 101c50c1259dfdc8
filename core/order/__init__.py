"""The rules of an order. Pure: nothing in here knows a database, a broker or HTTP."""

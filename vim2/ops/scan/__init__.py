"""The selective scan: public functions, the registered operator behind them, and its forms for every device."""

"""Control's REST API, one module per noun; ``app`` joins them."""

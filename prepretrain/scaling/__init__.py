"""A scaling study: what more data, a larger model or longer training would buy."""

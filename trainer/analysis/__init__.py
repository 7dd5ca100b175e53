"""Where the nats and the bytes of a score are: by loss, by length, by context, by class of token and by source."""

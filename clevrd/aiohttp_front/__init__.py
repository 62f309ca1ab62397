"""The way through aiohttp: what the raw path does not recognise is answered here.

What aiohttp lacks stands in one module for each question: where a request begins and ends, and
whether its line is one: `framing`. A client that is slow with its head or with reading, shuts its
side down, or is to hear a last word: `connection`. A body that is slow, cut short or too large:
`body`. An upgrade, or a stream: `upgrade`. What a request is: `front`.
"""

"""The aiohttp side: answers every request that the raw path does not recognise.

One module for each thing that aiohttp lacks. `framing`: the bounds of each request and the form of
its line. `connection`: slow heads, clients that do not read, half-closes, and answers that end a
connection. `body`: bodies that are slow, cut short or too large. `upgrade`: WebSockets and streams.
`front` turns aiohttp's requests into ours and our answers into its responses.
"""

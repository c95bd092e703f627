"""The demo: one long document, hidden needles, full attention beside IceCache and other methods.

document        the text, the needles in it and the questions about them
full_attention  stock attention that keeps what the other methods start from
methods         what is compared
run             runs it all; rows of the table
trace           what IceCache looked at, for the report
report          the self-contained HTML page (report.html is its template)
"""

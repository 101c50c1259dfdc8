"""Stands in for Mailpit where its image cannot be had: SMTP on 1025, and on 8025 the one call that stack-test makes."""

import asyncio
import email
import json
from email.policy import default

mails: list[dict[str, str]] = []


async def smtp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(b"220 mailsink\r\n")
    while line := await reader.readline():
        word = line.strip().upper()[:4]
        if word == b"DATA":
            writer.write(b"354 go on\r\n")
            message = email.message_from_bytes(await reader.readuntil(b"\r\n.\r\n"), policy=default)
            mails.append({"MessageID": message["Message-ID"].strip("<>"), "Subject": message["Subject"]})
        writer.write(b"221 bye\r\n" if word == b"QUIT" else b"250 OK\r\n")
        await writer.drain()
        if word == b"QUIT":
            break
    writer.close()


async def http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    body = json.dumps({"total": len(mails), "messages": mails}).encode()
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
    await writer.drain()
    writer.close()


async def main() -> None:
    servers = [await asyncio.start_server(smtp, "0.0.0.0", 1025), await asyncio.start_server(http, "0.0.0.0", 8025)]
    await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(main())

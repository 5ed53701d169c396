//! Questions for names: through the system's resolver, and as bare DNS messages.

use std::net::{IpAddr, SocketAddr};

use hickory_proto::op::{Message, Query};
use hickory_proto::rr::{Name, RData, RecordType};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};

use crate::kind::{Failure, Kind};

/// The addresses of a name and a port, as the C library finds them; a number is its own answer.
pub async fn resolve(to: &str) -> Result<Vec<SocketAddr>, Failure> {
    let found = tokio::net::lookup_host(to).await;
    let found: Vec<SocketAddr> = found.map_err(|error| Failure::new(Kind::Name, error))?.collect();
    if found.is_empty() {
        return Err(Failure::new(Kind::Name, "no address"));
    }
    Ok(found)
}

/// Asks `server`, or the first one of `/etc/resolv.conf`, for records of one type.
pub async fn ask(
    name: &str,
    record: &str,
    server: Option<IpAddr>,
    tcp: bool,
) -> Result<Value, Failure> {
    let server = match server {
        Some(server) => server,
        None => system_server()?,
    };
    let name = Name::from_utf8(name).map_err(Failure::wrong)?;
    let record: RecordType = record.to_uppercase().parse().map_err(Failure::wrong)?;
    let mut message = Message::query();
    message.add_query(Query::query(name, record));
    message.metadata.recursion_desired = true;
    let question = message.to_vec().map_err(Failure::wrong)?;
    let to = SocketAddr::new(server, 53);
    let answer = if tcp { over_tcp(to, &question).await? } else { over_udp(to, &question).await? };
    let answer = Message::from_vec(&answer).map_err(Failure::wrong)?;
    if answer.metadata.id != message.metadata.id {
        return Err(Failure::wrong("the answer is to another question"));
    }
    Ok(told(&answer))
}

fn told(answer: &Message) -> Value {
    let records: Vec<Value> = answer.answers.iter().map(|record| {
        let data = match &record.data {
            RData::A(address) => address.0.to_string(),
            RData::AAAA(address) => address.0.to_string(),
            other => other.to_string(),
        };
        json!({ "name": record.name.to_utf8(), "ttl": record.ttl, "type": record.record_type().to_string(), "data": data })
    }).collect();
    json!({
        "code": answer.metadata.response_code.to_str(),
        "authoritative": answer.metadata.authoritative,
        "answers": records,
    })
}

fn system_server() -> Result<IpAddr, Failure> {
    let text = std::fs::read_to_string("/etc/resolv.conf")?;
    let mut servers = text.lines().filter_map(|line| line.strip_prefix("nameserver"));
    let first = servers.find_map(|server| server.trim().parse().ok());
    first.ok_or_else(|| Failure::new(Kind::Name, "no name server in /etc/resolv.conf"))
}

async fn over_udp(to: SocketAddr, question: &[u8]) -> Result<Vec<u8>, Failure> {
    let any = if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).await?;
    // Connected, so that only the server's own answer is taken.
    socket.connect(to).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; 4096];
    let count = socket.recv(&mut buffer).await?;
    buffer.truncate(count);
    Ok(buffer)
}

async fn over_tcp(to: SocketAddr, question: &[u8]) -> Result<Vec<u8>, Failure> {
    let mut stream = TcpStream::connect(to).await?;
    let length = u16::try_from(question.len()).map_err(Failure::wrong)?;
    stream.write_all(&[&length.to_be_bytes(), question].concat()).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}

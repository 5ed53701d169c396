//! A name server in a namespace, whose answers follow from the names; and questions from pods.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::{Arc, Mutex, PoisonError};

use culvert_lab::place::Place;
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::{A, SOA, TXT};
use hickory_proto::rr::{Name, RData, Record, RecordType};

use crate::LIMIT;

/// The time to live of its answers, in seconds.
pub const TTL: u32 = 119;
/// How many addresses a name has that begins with `large`.
pub const LARGE: u32 = 200;

/// One question as the server saw it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Asked {
    /// In lower case.
    pub name: String,
    pub kind: RecordType,
    pub from: IpAddr,
    pub over_tcp: bool,
}

/// A server on port 53 of a place, for the rest of the test.
///
/// The first label of a name says what is answered: `nx`, `refused`, `empty`, `silent`, `large`
/// (truncated over UDP), `text`; anything else has the address 192.0.2.99.
#[derive(Clone, Debug)]
pub struct NameServer {
    asked: Arc<Mutex<Vec<Asked>>>,
    addr: SocketAddr,
}

impl NameServer {
    pub fn start(place: &Place, ip: IpAddr) -> io::Result<NameServer> {
        let addr = SocketAddr::new(ip, 53);
        let (udp, tcp) =
            place.run(|| Ok::<_, io::Error>((UdpSocket::bind(addr)?, TcpListener::bind(addr)?)))?;
        let server = NameServer { asked: Arc::default(), addr };
        let over_udp = server.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok((length, from)) = udp.recv_from(&mut buffer) {
                let answer = buffer.get(..length).and_then(|q| over_udp.answer(q, from, false));
                // A client that has gone away need not be told.
                let _ = answer.map(|answer| udp.send_to(&answer, from));
            }
        });
        let over_tcp = server.clone();
        std::thread::spawn(move || {
            while let Ok((stream, from)) = tcp.accept() {
                let server = over_tcp.clone();
                std::thread::spawn(move || server.converse(stream, from));
            }
        });
        Ok(server)
    }

    /// The text of a `resolv.conf` that names it.
    pub fn resolv_conf(&self) -> String {
        format!("nameserver {}\noptions timeout:1 attempts:1\n", self.addr.ip())
    }

    /// Everything it was asked about a name.
    pub fn asked(&self, name: &str) -> Vec<Asked> {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.iter().filter(|asked| asked.name == name).cloned().collect()
    }

    fn converse(&self, mut stream: TcpStream, from: SocketAddr) {
        while let Ok(question) = read_framed(&mut stream) {
            let Some(answer) = self.answer(&question, from, true) else { return };
            if stream.write_all(&framed(&answer)).is_err() {
                return;
            }
        }
    }

    fn answer(&self, question: &[u8], from: SocketAddr, over_tcp: bool) -> Option<Vec<u8>> {
        let question = Message::from_vec(question).ok()?;
        let query = question.queries.first()?.clone();
        let name = query.name().to_ascii().trim_end_matches('.').to_ascii_lowercase();
        let kind = query.query_type();
        let asked = Asked { name: name.clone(), kind, from: from.ip().to_canonical(), over_tcp };
        self.asked.lock().unwrap_or_else(PoisonError::into_inner).push(asked);

        let mut answer = Message::response(question.metadata.id, OpCode::Query);
        answer.metadata.recursion_desired = question.metadata.recursion_desired;
        answer.metadata.recursion_available = true;
        let owner = query.name().clone();
        answer.add_query(query);
        let address = |n: u32| {
            let ip = std::net::Ipv4Addr::from(0xc000_0200 + n);
            Record::from_rdata(owner.clone(), TTL, RData::A(A(ip)))
        };
        match name.split('.').next().unwrap_or_default() {
            "silent" => return None,
            "nx" => {
                answer.metadata.response_code = ResponseCode::NXDomain;
                answer.add_authority(start_of_authority());
            }
            "refused" => answer.metadata.response_code = ResponseCode::Refused,
            "empty" => {}
            "large" if over_tcp => {
                answer.add_answers((0..LARGE).map(address));
            }
            "large" => {
                answer.metadata.truncation = true;
            }
            _ if kind == RecordType::TXT => {
                let text = RData::TXT(TXT::new(vec!["hello".to_owned()]));
                answer.add_answer(Record::from_rdata(owner.clone(), TTL, text));
            }
            _ if kind == RecordType::A => {
                answer.add_answer(address(99));
            }
            _ => {}
        }
        answer.to_vec().ok()
    }
}

fn start_of_authority() -> Record {
    let name = |text| Name::from_ascii(text).unwrap_or_default();
    let soa = SOA::new(name("ns.example."), name("admin.example."), 1, 2, 3, 4, 60);
    Record::from_rdata(name("example."), 60, RData::SOA(soa))
}

/// A question as most clients ask it.
pub fn query(name: &str, kind: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    let mut name = Name::from_ascii(name).unwrap_or_default();
    name.set_fqdn(true);
    message.add_query(Query::query(name, kind));
    message
}

/// The same from a client that takes larger answers.
pub fn query_with_edns(name: &str, kind: RecordType, payload: u16, dnssec_ok: bool) -> Message {
    let mut message = query(name, kind);
    let mut edns = Edns::new();
    edns.set_max_payload(payload);
    edns.set_dnssec_ok(dnssec_ok);
    message.set_edns(edns);
    message
}

/// Whether an answer belongs to a question.
fn checked(question: &Message, answer: &[u8]) -> io::Result<Message> {
    let answer = Message::from_vec(answer).map_err(io::Error::other)?;
    let fits = answer.metadata.id == question.metadata.id
        && answer.metadata.message_type == MessageType::Response;
    if fits { Ok(answer) } else { Err(io::Error::other(format!("not the answer: {answer}"))) }
}

/// Asks over UDP, by a socket that is not connected, and takes the answer from the server only.
pub fn ask_udp(place: &Place, server: SocketAddr, question: &Message) -> io::Result<Message> {
    let socket = udp_socket(place, server)?;
    socket.send_to(&question.to_vec().map_err(io::Error::other)?, server)?;
    let mut buffer = [0; 65_535];
    let (length, from) = socket.recv_from(&mut buffer)?;
    if from != server {
        return Err(io::Error::other(format!("{from} answers instead of {server}")));
    }
    checked(question, buffer.get(..length).unwrap_or_default())
}

/// Asks over UDP, by a connected socket.
pub fn ask_connected(place: &Place, server: SocketAddr, question: &Message) -> io::Result<Message> {
    let socket = udp_socket(place, server)?;
    place.run(|| socket.connect(server))?;
    socket.send(&question.to_vec().map_err(io::Error::other)?)?;
    let mut buffer = [0; 65_535];
    let length = socket.recv(&mut buffer)?;
    checked(question, buffer.get(..length).unwrap_or_default())
}

/// A UDP socket of a place, with a time limit.
pub fn udp_socket(place: &Place, server: SocketAddr) -> io::Result<UdpSocket> {
    let any: IpAddr = match server.is_ipv4() {
        true => std::net::Ipv4Addr::UNSPECIFIED.into(),
        false => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = place.run(|| UdpSocket::bind((any, 0)))?;
    socket.set_read_timeout(Some(LIMIT))?;
    Ok(socket)
}

/// Asks over TCP.
pub fn ask_tcp(place: &Place, server: SocketAddr, question: &Message) -> io::Result<Message> {
    let mut stream = place.run(|| TcpStream::connect_timeout(&server, LIMIT))?;
    stream.set_read_timeout(Some(LIMIT))?;
    stream.write_all(&framed(&question.to_vec().map_err(io::Error::other)?))?;
    checked(question, &read_framed(&mut stream)?)
}

/// A message after its length (RFC 7766 section 8).
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u16::try_from(message.len()).unwrap_or(u16::MAX);
    [&length.to_be_bytes(), message].concat()
}

/// The next message of a connection.
pub fn read_framed(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; u16::from_be_bytes(length).into()];
    stream.read_exact(&mut message)?;
    Ok(message)
}

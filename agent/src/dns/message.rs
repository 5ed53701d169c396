//! Questions as they come from pods, and the answers that go back (RFC 1035 section 4.1).

use hickory_proto::op::{Edns, Message, Metadata, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, Record, RecordType};

/// Length of a message's header.
const HEADER: usize = 12;
/// The shortest that a record can be: the root's name, type, class, time to live, length.
const RECORD: usize = 11;
/// The least size of answers that every client takes over UDP (RFC 1035 section 4.2.1).
const LEAST_UDP_SIZE: u16 = 512;
/// The most that fits in a UDP datagram over IPv4.
const MOST_UDP_SIZE: u16 = 65_507;
/// What an address record takes at least when its owner was named before.
const ADDRESS_RECORD: usize = 16;

/// Response codes for what is no question.
const FORMAT_ERROR: u8 = 1;
const NOT_IMPLEMENTED: u8 = 4;

/// One question, with what of its message the answer repeats.
#[derive(Clone, Debug)]
pub struct Question {
    metadata: Metadata,
    query: Query,
    edns: Option<Edns>,
}

/// Why a message is not answered as a question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rejected {
    /// Too short to be answered at all.
    Silently,
    /// To be answered with this.
    With(Vec<u8>),
}

/// How an answer travels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Transport {
    Udp,
    Tcp,
}

impl Transport {
    /// As the metrics name it.
    pub fn label(self) -> &'static str {
        match self {
            Transport::Udp => "udp",
            Transport::Tcp => "tcp",
        }
    }
}

/// What is answered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reply {
    pub code: ResponseCode,
    /// The mesh itself answers.
    pub authoritative: bool,
    pub answers: Vec<Record>,
    pub authorities: Vec<Record>,
    pub additionals: Vec<Record>,
}

impl Reply {
    pub fn failure(code: ResponseCode) -> Self {
        Self { code, ..Self::default() }
    }
}

impl Question {
    /// Reads a message of any bytes. It must be a query with exactly one question.
    pub fn parse(bytes: &[u8]) -> Result<Question, Rejected> {
        let header: &[u8; HEADER] = bytes.first_chunk().ok_or(Rejected::Silently)?;
        let [_, _, flags, _, counts @ ..] = header;
        let rejected = |code| Rejected::With(reject(header, code));
        let (is_response, operation) = (flags & 0x80 != 0, flags >> 3 & 0xf);
        if is_response {
            return Err(rejected(FORMAT_ERROR));
        }
        if operation != 0 {
            return Err(rejected(NOT_IMPLEMENTED));
        }
        let (counts, _) = counts.as_chunks::<2>();
        let mut counts = counts.iter().map(|count| usize::from(u16::from_be_bytes(*count)));
        let questions = counts.next();
        // Nothing is set aside for records that cannot be there.
        if questions != Some(1) || counts.sum::<usize>() > bytes.len() / RECORD {
            return Err(rejected(FORMAT_ERROR));
        }
        let Ok(message) = Message::from_vec(bytes) else { return Err(rejected(FORMAT_ERROR)) };
        let Message { metadata, mut queries, edns, .. } = message;
        let query = queries.pop().ok_or_else(|| rejected(FORMAT_ERROR))?;
        Ok(Question { metadata, query, edns })
    }

    pub fn name(&self) -> &Name {
        self.query.name()
    }

    pub fn kind(&self) -> RecordType {
        self.query.query_type()
    }

    /// Whether it is about the Internet, as all but a few diagnostic questions are.
    pub fn is_internet(&self) -> bool {
        self.query.query_class() == DNSClass::IN
    }

    /// The name as hostnames are compared: in lower case, without the last dot. `None` when a label
    /// has bytes that no hostname has.
    pub fn hostname(&self) -> Option<String> {
        let mut hostname = String::with_capacity(self.name().len());
        for label in self.name().iter() {
            let fits = |byte: &u8| byte.is_ascii_graphic() && *byte != b'.';
            if !label.iter().all(fits) {
                return None;
            }
            if !hostname.is_empty() {
                hostname.push('.');
            }
            hostname.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
        }
        Some(hostname)
    }

    /// The first labels of the name, in the letters of the question.
    pub fn first_labels(&self, count: usize) -> Option<Name> {
        let mut name = Name::from_labels(self.name().iter().take(count)).ok()?;
        name.set_fqdn(true);
        Some(name)
    }

    /// The answer as it goes back. What does not fit loses its last records, and says so.
    pub fn answer(&self, reply: Reply, transport: Transport) -> Vec<u8> {
        let limit = self.limit(transport);
        let mut message = self.message(reply);
        // Those beyond cannot fit whatever they are.
        let most = limit / ADDRESS_RECORD + 1;
        if message.answers.len() > most {
            message.answers.truncate(most);
            message.metadata.truncation = true;
        }
        if let Some(whole) = encoded(&message, limit) {
            return whole;
        }
        message.metadata.truncation = true;
        message.authorities.clear();
        message.additionals.clear();
        let answers = std::mem::take(&mut message.answers);
        let mut attempt = |count: usize| {
            message.answers = answers.get(..count).unwrap_or_default().to_vec();
            encoded(&message, limit)
        };
        let (mut fits, mut exceeds) = (0, answers.len() + 1);
        while exceeds - fits > 1 {
            let middle = fits.midpoint(exceeds);
            match attempt(middle) {
                Some(_) => fits = middle,
                None => exceeds = middle,
            }
        }
        attempt(fits).unwrap_or_default()
    }

    /// The most bytes that the client takes.
    fn limit(&self, transport: Transport) -> usize {
        let limit = match (transport, &self.edns) {
            (Transport::Tcp, _) => u16::MAX,
            (Transport::Udp, None) => LEAST_UDP_SIZE,
            (Transport::Udp, Some(edns)) => edns.max_payload().clamp(LEAST_UDP_SIZE, MOST_UDP_SIZE),
        };
        limit.into()
    }

    fn message(&self, reply: Reply) -> Message {
        let Reply { code, authoritative, answers, authorities, additionals } = reply;
        let mut message = Message::query();
        message.metadata = Metadata::response_from_request(&self.metadata);
        message.metadata.response_code = code;
        message.metadata.authoritative = authoritative;
        message.metadata.recursion_available = true;
        message.queries = vec![self.query.clone()];
        message.answers = answers;
        message.authorities = authorities;
        message.additionals = additionals;
        message.edns = self.edns.as_ref().map(|theirs| {
            let mut edns = Edns::new();
            edns.set_max_payload(theirs.max_payload());
            edns.set_version(theirs.version());
            edns.set_dnssec_ok(theirs.flags().dnssec_ok);
            edns
        });
        message
    }
}

/// `None` when it is longer than the limit.
fn encoded(message: &Message, limit: usize) -> Option<Vec<u8>> {
    let bytes = message.to_vec().ok().filter(|bytes| bytes.len() <= limit)?;
    // The encoder leaves out what exceeds a message's largest size, and says so.
    let truncated = bytes.get(2).is_some_and(|flags| flags & 0x02 != 0);
    (truncated == message.metadata.truncation).then_some(bytes)
}

/// An answer that is a header only, with identifier, operation and the wish for recursion as asked.
fn reject(header: &[u8; HEADER], code: u8) -> Vec<u8> {
    let [id_high, id_low, flags, ..] = *header;
    let mut answer = vec![id_high, id_low, 0x80 | flags & 0x79, 0x80 | code];
    answer.resize(HEADER, 0);
    answer
}

#[cfg(test)]
mod tests;

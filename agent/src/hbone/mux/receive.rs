//! What the peer's frames do to a connection.

use super::super::frame::{self, Head, Piece, Reason, flag, kind, setting};
use super::super::stream::StreamError;
use super::super::windows::INITIAL_WINDOW;
use super::headers::{Block, Fields};
use super::stream::Stream;
use super::{ALIVE, ConnectionError, LEAVE, Leaving, Role, State};

/// Frames other than DATA are kept until they are whole, up to this length.
const WHOLE: u32 = 256 << 10;

/// DATA frames without content in a row. One ends a stream; more are of no use.
const EMPTY_IN_A_ROW: usize = 10_000;

/// RFC 9113 section 6.9.1.
const MAX_WINDOW: i64 = (1 << 31) - 1;

type Done = Result<(), ConnectionError>;

fn fault(reason: Reason, why: &'static str) -> ConnectionError {
    ConnectionError::Fault(reason, why)
}

fn protocol(why: &'static str) -> ConnectionError {
    fault(Reason::PROTOCOL_ERROR, why)
}

impl State {
    /// Acts on `bytes` from the peer.
    pub(in crate::hbone) fn receive(&mut self, mut bytes: &[u8]) -> Done {
        self.take_preface(&mut bytes)?;
        // The cutter lends what it kept, while the rest of the state acts on it.
        let mut cutter = std::mem::take(&mut self.cutter);
        let received = self.receive_frames(&mut cutter, bytes);
        self.cutter = cutter;
        received
    }

    fn take_preface(&mut self, bytes: &mut &[u8]) -> Done {
        let count = self.preface.len().min(bytes.len());
        let ((expected, missing), (came, rest)) =
            (self.preface.split_at(count), bytes.split_at(count));
        if expected != came {
            return Err(protocol("no http2 preface"));
        }
        (self.preface, *bytes) = (missing, rest);
        Ok(())
    }

    fn receive_frames(&mut self, cutter: &mut frame::Cutter, mut bytes: &[u8]) -> Done {
        let max = self.local.max_frame;
        loop {
            let piece = cutter.next(&mut bytes, max, WHOLE);
            let piece = piece.map_err(|_| fault(Reason::FRAME_SIZE_ERROR, "frame too large"))?;
            match piece {
                None if bytes.is_empty() => return Ok(()),
                None => {}
                Some(Piece::Data { head, part, rest }) => self.data(head, part, rest)?,
                Some(Piece::Frame { head, payload }) => self.frame(head, payload)?,
            }
            if self.out.is_flooded() {
                return Err(fault(Reason::ENHANCE_YOUR_CALM, "answers are not read"));
            }
        }
    }

    fn frame(&mut self, head: Head, payload: &[u8]) -> Done {
        if self.block.is_some() && head.kind != kind::CONTINUATION {
            return Err(protocol("header block interrupted"));
        }
        // RFC 9113 section 3.4.
        if !self.is_introduced && (head.kind != kind::SETTINGS || head.has(flag::ACK)) {
            return Err(protocol("no settings at the begin"));
        }
        match head.kind {
            kind::HEADERS => self.headers(head, payload),
            kind::CONTINUATION => self.continuation(head, payload),
            kind::RST_STREAM => self.peer_reset(head, payload),
            kind::SETTINGS => self.settings(head, payload),
            kind::PING => self.pinged(head, payload),
            kind::GOAWAY => self.goaway(head, payload),
            kind::WINDOW_UPDATE => self.window_update(head, payload),
            kind::PUSH_PROMISE => Err(protocol("push")),
            kind::PRIORITY if payload.len() != 5 => {
                Err(fault(Reason::FRAME_SIZE_ERROR, "priority"))
            }
            // Unknown frames are passed over (RFC 9113 section 4.1).
            _ => Ok(()),
        }
    }

    /// Whether a stream was opened, and may since have ended and been forgotten. Behind our last word
    /// the peer may have opened any.
    fn has_been(&self, id: u32) -> bool {
        match self.role {
            Role::Client => id % 2 == 1 && id < self.next,
            Role::Server => id % 2 == 1 && (id <= self.last || self.leaving == Leaving::Named),
        }
    }

    /// A piece of a DATA frame. Padding counts as data for the windows, and as nothing else.
    fn data(&mut self, head: Head, part: &[u8], rest: u32) -> Done {
        if self.block.is_some() {
            return Err(protocol("header block interrupted"));
        }
        if !self.has_been(head.stream) {
            return Err(protocol("data on a stream that was not opened"));
        }
        let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
        self.receive_window -= i64::from(length);
        if self.receive_window < 0 {
            return Err(fault(Reason::FLOW_CONTROL_ERROR, "connection window exceeded"));
        }
        let payload = self.without_padding(head, part, rest)?;
        self.note_content(head, payload)?;
        let mut consumed = length;
        if let Some(reason) = self.unwanted(head.stream) {
            self.punish(head.stream, reason)?;
        }
        let is_receiving = self.streams.get(head.stream).is_some_and(Stream::is_receiving);
        if let Some(stream) = self.streams.get_mut(head.stream).filter(|_| is_receiving) {
            stream.receive_window -= i64::from(length);
            if stream.receive_window < 0 {
                return Err(fault(Reason::FLOW_CONTROL_ERROR, "stream window exceeded"));
            }
            let padding = length - u32::try_from(payload.len()).unwrap_or(length);
            consumed = padding + if payload.is_empty() { 0 } else { stream.take_in(payload) };
            let increment = stream.returned(consumed, self.peer.returned_together());
            if increment > 0 {
                frame::put_window_update(&mut self.out.control, head.stream, increment);
            }
        }
        // What nobody waits for any more counts as consumed.
        self.return_connection(consumed);
        if rest == 0 && head.has(flag::END_STREAM) && is_receiving {
            self.end_receiving(head.stream);
        }
        Ok(())
    }

    /// Why DATA must not come on a stream that is open.
    fn unwanted(&self, id: u32) -> Option<Reason> {
        let stream = self.streams.get(id).filter(|stream| stream.is_open())?;
        match self.role {
            // RFC 9113 section 5.1.
            _ if !stream.is_receiving() => Some(Reason::STREAM_CLOSED),
            // RFC 9113 section 8.1.
            Role::Client if !stream.is_answered() => Some(Reason::PROTOCOL_ERROR),
            Role::Client | Role::Server => None,
        }
    }

    /// The payload of this piece of a frame, of which `rest` bytes follow.
    fn without_padding<'a>(
        &mut self,
        head: Head,
        part: &'a [u8],
        rest: u32,
    ) -> Result<&'a [u8], ConnectionError> {
        if !head.has(flag::PADDED) {
            return Ok(part);
        }
        let length = u32::try_from(part.len()).unwrap_or(u32::MAX);
        let before = head.length.saturating_sub(rest + length);
        let mut payload = part;
        if before == 0 {
            let (padding, content) =
                part.split_first().ok_or_else(|| protocol("padded data without padding"))?;
            self.padding = u32::from(*padding);
            payload = content;
            if self.padding >= head.length {
                return Err(protocol("more padding than data"));
            }
        }
        // Bytes of content end this many before the frame does.
        let excess = self.padding.saturating_sub(rest) as usize;
        Ok(payload.get(..payload.len().saturating_sub(excess)).unwrap_or_default())
    }

    fn note_content(&mut self, head: Head, payload: &[u8]) -> Done {
        if !payload.is_empty() || head.length > 0 {
            self.empty = 0;
        } else {
            self.empty += 1;
            if self.empty > EMPTY_IN_A_ROW {
                return Err(fault(Reason::ENHANCE_YOUR_CALM, "empty frames"));
            }
        }
        Ok(())
    }

    fn end_receiving(&mut self, id: u32) {
        if let Some(stream) = self.streams.get_mut(id) {
            stream.finish_receiving();
        }
        self.streams.note_closed(id);
    }

    fn headers(&mut self, head: Head, payload: &[u8]) -> Done {
        let mut block = payload;
        let mut padding = 0;
        if head.has(flag::PADDED) {
            let (length, rest) = block.split_first().ok_or_else(|| protocol("padded headers"))?;
            (padding, block) = (usize::from(*length), rest);
        }
        if head.has(flag::PRIORITY) {
            block = block.get(5..).ok_or_else(|| protocol("headers with priority"))?;
        }
        let end = block.len().checked_sub(padding);
        let block = end.and_then(|end| block.get(..end));
        let block = block.ok_or_else(|| protocol("more padding than headers"))?;
        let (stream, end_stream) = (head.stream, head.has(flag::END_STREAM));
        self.block = Some(Block { stream, end_stream, bytes: block.to_vec() });
        if head.has(flag::END_HEADERS) { self.end_block() } else { Ok(()) }
    }

    fn continuation(&mut self, head: Head, payload: &[u8]) -> Done {
        let Some(block) = self.block.as_mut().filter(|block| block.stream == head.stream) else {
            return Err(protocol("continuation of nothing"));
        };
        if payload.is_empty() && !head.has(flag::END_HEADERS) {
            return Err(fault(Reason::ENHANCE_YOUR_CALM, "empty continuations"));
        }
        block.bytes.extend_from_slice(payload);
        if block.bytes.len() > WHOLE as usize {
            return Err(fault(Reason::ENHANCE_YOUR_CALM, "endless header block"));
        }
        if head.has(flag::END_HEADERS) { self.end_block() } else { Ok(()) }
    }

    /// A header block is whole: a request, an answer, or trailers.
    fn end_block(&mut self) -> Done {
        let Some(block) = self.block.take() else { return Ok(()) };
        // Decoded in each case, for it may change the table.
        let fields = Fields::decode(&mut self.decoder, &block.bytes, self.local.header_list);
        let fields = fields
            .map_err(|_| fault(Reason::COMPRESSION_ERROR, "header block cannot be decoded"))?;
        match self.role {
            Role::Server if block.stream > self.last => self.requested(&block, fields),
            Role::Client if self.has_been(block.stream) => self.answered(&block, fields),
            Role::Server if self.has_been(block.stream) => self.trailers(&block, &fields),
            Role::Client | Role::Server => Err(protocol("headers on a stream of no kind")),
        }
    }

    fn requested(&mut self, block: &Block, fields: Fields) -> Done {
        if block.stream.is_multiple_of(2) {
            return Err(protocol("request on an even stream"));
        }
        // After our last word on it, new streams are not acted on (RFC 9113 section 6.8).
        if self.leaving == Leaving::Named {
            return Ok(());
        }
        self.last = block.stream;
        if self.streams.open() >= self.local.max_streams as usize {
            self.out.reset(block.stream, Reason::REFUSED_STREAM);
            return Ok(());
        }
        let Ok(arrived) = fields.request(block.stream) else {
            self.out.reset(block.stream, Reason::PROTOCOL_ERROR);
            return self.note_fault();
        };
        // Open ones, and those that have ended before anybody took them.
        if self.arrived.len() > 2 * self.local.max_streams as usize {
            return Err(fault(Reason::ENHANCE_YOUR_CALM, "requests end at once"));
        }
        let stream = Stream::new(self.send_initial, self.first_window());
        self.streams.insert(block.stream, stream);
        if block.end_stream {
            self.end_receiving(block.stream);
        }
        self.arrived.push_back(arrived);
        Ok(())
    }

    fn answered(&mut self, block: &Block, fields: Fields) -> Done {
        let Some(stream) = self.streams.get_mut(block.stream) else { return Ok(()) };
        if stream.is_answered() {
            return self.trailers(block, &fields);
        }
        match fields.answer() {
            // What precedes the answer says nothing about a tunnel.
            Ok(head) if head.status.is_informational() && !block.end_stream => {}
            Ok(head) => {
                stream.set_answer(head);
                if block.end_stream {
                    self.end_receiving(block.stream);
                }
            }
            Err(_) => self.punish(block.stream, Reason::PROTOCOL_ERROR)?,
        }
        self.peer.note_answer();
        Ok(())
    }

    /// Whatever trailers say, they end the stream.
    fn trailers(&mut self, block: &Block, fields: &Fields) -> Done {
        if !block.end_stream || fields.is_malformed() {
            self.punish(block.stream, Reason::PROTOCOL_ERROR)?;
        } else if self.streams.get(block.stream).is_some_and(Stream::is_receiving) {
            self.end_receiving(block.stream);
        }
        Ok(())
    }

    fn peer_reset(&mut self, head: Head, payload: &[u8]) -> Done {
        let code: [u8; 4] =
            payload.try_into().map_err(|_| fault(Reason::FRAME_SIZE_ERROR, "reset"))?;
        if !self.has_been(head.stream) {
            return Err(protocol("reset of a stream that was not opened"));
        }
        let reason = Reason::from(u32::from_be_bytes(code));
        if let Some(stream) = self.streams.get_mut(head.stream) {
            match reason {
                Reason::REFUSED_STREAM => stream.refused_unseen(StreamError::Reset(reason)),
                _ => stream.broken(StreamError::Reset(reason)),
            }
            self.streams.note_closed(head.stream);
        }
        // A request that nobody has taken yet stays in the row, and counts against whoever resets
        // many.
        if self.arrived.iter().any(|arrived| arrived.stream == head.stream) {
            self.withdrawn += 1;
            if self.withdrawn > self.local.max_streams as usize {
                return Err(fault(Reason::ENHANCE_YOUR_CALM, "requests are reset at once"));
            }
        }
        Ok(())
    }

    fn settings(&mut self, head: Head, payload: &[u8]) -> Done {
        if head.stream != 0 {
            return Err(protocol("settings of a stream"));
        }
        if !payload.len().is_multiple_of(6) || head.has(flag::ACK) && !payload.is_empty() {
            return Err(fault(Reason::FRAME_SIZE_ERROR, "settings"));
        }
        if head.has(flag::ACK) {
            self.acknowledged();
            return Ok(());
        }
        let is_first = !std::mem::replace(&mut self.is_introduced, true);
        let (mut window, mut streams) = (None, None);
        for entry in payload.chunks_exact(6) {
            let [n0, n1, v0, v1, v2, v3] = *entry else { continue };
            let value = u32::from_be_bytes([v0, v1, v2, v3]);
            match u16::from_be_bytes([n0, n1]) {
                setting::INITIAL_WINDOW_SIZE if i64::from(value) > MAX_WINDOW => {
                    return Err(fault(Reason::FLOW_CONTROL_ERROR, "initial window"));
                }
                setting::INITIAL_WINDOW_SIZE => window = Some(value),
                setting::MAX_CONCURRENT_STREAMS => streams = Some(value),
                setting::MAX_FRAME_SIZE if (1 << 14..1 << 24).contains(&value) => {
                    self.send_frame = value;
                }
                setting::MAX_FRAME_SIZE => return Err(protocol("frame size of no kind")),
                // Only clients may want pushes (RFC 9113 section 6.5.2).
                setting::ENABLE_PUSH if value > 1 || value == 1 && self.role == Role::Client => {
                    return Err(protocol("push of no kind"));
                }
                setting::HEADER_TABLE_SIZE => self.tells_table = true,
                // What we send is short. Unknown settings are passed over.
                _ => {}
            }
        }
        // Once, however often they say it.
        if let Some(window) = window {
            self.change_initial_window(window.into())?;
        }
        self.peer.note_settings(window, streams);
        if is_first {
            self.streams.iter_mut().for_each(Stream::wake_writer);
        }
        frame::put(&mut self.out.control, kind::SETTINGS, flag::ACK, 0, &[]);
        Ok(())
    }

    /// The peer knows our SETTINGS. Until then it may have sent as much as it could not know to be
    /// too much (RFC 9113 section 6.9.3).
    fn acknowledged(&mut self) {
        self.peer.note_answer();
        if !std::mem::replace(&mut self.is_acknowledged, true) {
            let beyond = INITIAL_WINDOW.saturating_sub(self.local.stream_window);
            for stream in self.streams.iter_mut() {
                stream.receive_window -= i64::from(beyond);
            }
        }
    }

    /// What the peer may send on a new stream.
    pub(super) fn first_window(&self) -> u32 {
        match self.is_acknowledged {
            true => self.local.stream_window,
            false => self.local.stream_window.max(INITIAL_WINDOW),
        }
    }

    /// Holds for streams that are open, too (RFC 9113 section 6.9.2).
    fn change_initial_window(&mut self, window: i64) -> Done {
        let change = window - self.send_initial;
        self.send_initial = window;
        for stream in self.streams.iter_mut() {
            stream.send_window += change;
            if stream.send_window > MAX_WINDOW {
                return Err(fault(Reason::FLOW_CONTROL_ERROR, "initial window"));
            }
            stream.wake_writer();
        }
        Ok(())
    }

    fn pinged(&mut self, head: Head, payload: &[u8]) -> Done {
        let data: [u8; 8] =
            payload.try_into().map_err(|_| fault(Reason::FRAME_SIZE_ERROR, "ping"))?;
        if head.stream != 0 {
            return Err(protocol("ping of a stream"));
        }
        if !head.has(flag::ACK) {
            self.peer.note_answer();
            frame::put(&mut self.out.control, kind::PING, flag::ACK, 0, &data);
            return Ok(());
        }
        match data {
            ALIVE => self.ping.awaited = false,
            LEAVE if self.leaving == Leaving::Announced => {
                self.leaving = Leaving::Named;
                frame::put_goaway(&mut self.out.control, self.last, Reason::NO_ERROR);
            }
            _ => {}
        }
        Ok(())
    }

    fn goaway(&mut self, head: Head, payload: &[u8]) -> Done {
        if head.stream != 0 {
            return Err(protocol("goaway of a stream"));
        }
        let Some(([l0, l1, l2, l3, c0, c1, c2, c3], _told)) = payload.split_first_chunk::<8>()
        else {
            return Err(fault(Reason::FRAME_SIZE_ERROR, "goaway"));
        };
        let last = u32::from_be_bytes([l0 & 0x7f, *l1, *l2, *l3]);
        let reason = Reason::from(u32::from_be_bytes([*c0, *c1, *c2, *c3]));
        self.peer.note_goaway();
        if self.role == Role::Client {
            let error = StreamError::Broken(ConnectionError::ByPeer(reason).to_string());
            let mut unseen = Vec::new();
            for (id, stream) in self.streams.with_ids().filter(|(id, _)| *id > last) {
                stream.refused_unseen(error.clone());
                unseen.push(id);
            }
            unseen.into_iter().for_each(|id| self.streams.note_closed(id));
        }
        if reason == Reason::NO_ERROR { Ok(()) } else { Err(ConnectionError::ByPeer(reason)) }
    }

    fn window_update(&mut self, head: Head, payload: &[u8]) -> Done {
        let increment: [u8; 4] =
            payload.try_into().map_err(|_| fault(Reason::FRAME_SIZE_ERROR, "window update"))?;
        let increment = u32::from_be_bytes(increment) & 0x7fff_ffff;
        let more = i64::from(increment);
        if head.stream == 0 {
            self.send_window += more;
            if increment == 0 {
                return Err(protocol("connection window grows by nothing"));
            }
            if self.send_window > MAX_WINDOW {
                return Err(fault(Reason::FLOW_CONTROL_ERROR, "connection window"));
            }
            self.peer.note_connection_update(increment);
            // Any of them may have waited for this.
            if self.send_window > 0 {
                self.streams.iter_mut().for_each(Stream::wake_writer);
            }
            return Ok(());
        }
        if !self.has_been(head.stream) {
            return Err(protocol("window of a stream that was not opened"));
        }
        let Some(stream) = self.streams.get_mut(head.stream) else { return Ok(()) };
        stream.send_window += more;
        if increment == 0 {
            return self.punish(head.stream, Reason::PROTOCOL_ERROR);
        }
        if stream.send_window > MAX_WINDOW {
            return self.punish(head.stream, Reason::FLOW_CONTROL_ERROR);
        }
        stream.wake_writer();
        Ok(())
    }
}

use std::fmt;

use bytes::Bytes;
use http::header::{HeaderMap, HeaderName, HeaderValue, LOCATION};
use http::{Response, StatusCode};

/// Raised whenever the bytes change; every earlier version stays readable.
const VERSION: u8 = 1;

const WHOLE: u8 = 0;
const TOMBSTONE: u8 = 1;

/// A stored answer: status, headers in order, body, byte for byte.
///
/// Without a body it is a *tombstone*: the operation was answered, but what it answered was too
/// large, too slow or endless.
///
/// ```
/// use tower_idempotency::Envelope;
/// use http::Response;
///
/// let answer = Response::builder().status(201).header("location", "/orders/1").body("{}".into())?;
/// let envelope = Envelope::new(answer);
/// assert_eq!(Envelope::decode(&envelope.encode())?, envelope);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Envelope {
    status: StatusCode,
    headers: Vec<(HeaderName, HeaderValue)>,
    body: Option<Bytes>,
}

impl Envelope {
    /// The whole of an answer.
    #[must_use]
    pub fn new(answer: Response<Bytes>) -> Self {
        let (parts, body) = answer.into_parts();
        let headers = parts.headers.iter();
        Self {
            status: parts.status,
            headers: headers.map(|(n, v)| (n.clone(), v.clone())).collect(),
            body: Some(body),
        }
    }

    /// That there was an answer: its status, and where it pointed.
    ///
    /// ```
    /// use http::{HeaderMap, StatusCode};
    /// use tower_idempotency::Envelope;
    ///
    /// let tombstone = Envelope::tombstone(StatusCode::CREATED, &HeaderMap::new());
    /// assert_eq!((tombstone.status(), tombstone.body()), (StatusCode::CREATED, None));
    /// ```
    #[must_use]
    pub fn tombstone(status: StatusCode, headers: &HeaderMap) -> Self {
        let location = headers.get(LOCATION).cloned();
        Self {
            status,
            headers: location
                .into_iter()
                .map(|value| (LOCATION, value))
                .collect(),
            body: None,
        }
    }

    /// The status of the first answer.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The headers of the first answer that are replayed, in their order.
    #[must_use]
    pub fn headers(&self) -> &[(HeaderName, HeaderValue)] {
        &self.headers
    }

    /// The body of the first answer, or `None` for a tombstone.
    #[must_use]
    pub fn body(&self) -> Option<&Bytes> {
        self.body.as_ref()
    }

    /// The first value of a header.
    ///
    /// ```
    /// use http::{Response, header::LOCATION};
    /// use tower_idempotency::Envelope;
    ///
    /// let answer = Response::builder().header(LOCATION, "/orders/1").body("{}".into())?;
    /// assert_eq!(Envelope::new(answer).header(&LOCATION).unwrap(), "/orders/1");
    /// # Ok::<(), http::Error>(())
    /// ```
    #[must_use]
    pub fn header(&self, name: &HeaderName) -> Option<&HeaderValue> {
        let mut headers = self.headers.iter();
        headers.find(|(n, _)| n == name).map(|(_, value)| value)
    }

    /// The versioned bytes that a store keeps, closed by a CRC-32 of all before it.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let body = self.body.as_deref().unwrap_or_default();
        let mut out = Vec::with_capacity(64 + body.len());
        out.push(VERSION);
        out.push(if self.body.is_some() {
            WHOLE
        } else {
            TOMBSTONE
        });
        out.extend(self.status.as_u16().to_be_bytes());
        push_len(&mut out, self.headers.len());
        for (name, value) in &self.headers {
            push_field(&mut out, name.as_str().as_bytes());
            push_field(&mut out, value.as_bytes());
        }
        push_field(&mut out, body);
        let checksum = crc32fast::hash(&out);
        out.extend(checksum.to_be_bytes());
        out
    }

    /// The status, of no more than the first bytes. Not checked against the checksum: it is shown to
    /// people, and never replayed.
    pub(crate) fn status_in(bytes: &[u8]) -> Result<StatusCode, EnvelopeError> {
        let mut input = Input(bytes);
        let [version, _] = input.array()?;
        if version != VERSION {
            return Err(EnvelopeError("of an unknown version"));
        }
        input.status()
    }

    /// Reads what [`encode`](Self::encode) wrote.
    ///
    /// # Errors
    ///
    /// Bytes of another version, cut or changed bytes, and values that are no status or header.
    ///
    /// ```
    /// use tower_idempotency::Envelope;
    ///
    /// let mut bytes = Envelope::new(http::Response::new("paid".into())).encode();
    /// assert!(Envelope::decode(&bytes).is_ok());
    /// bytes[8] ^= 1;
    /// assert!(Envelope::decode(&bytes).is_err());
    /// ```
    pub fn decode(bytes: &[u8]) -> Result<Self, EnvelopeError> {
        let (content, checksum) = bytes.split_last_chunk().ok_or(EnvelopeError("cut"))?;
        let mut input = Input(content);
        let [version, kind] = input.array()?;
        if version != VERSION {
            return Err(EnvelopeError("of an unknown version"));
        }
        if crc32fast::hash(content) != u32::from_be_bytes(*checksum) {
            return Err(EnvelopeError("changed since it was written"));
        }
        let status = input.status()?;
        let count = input.len()?;
        let headers = (0..count)
            .map(|_| input.header())
            .collect::<Result<_, _>>()?;
        let body = Bytes::copy_from_slice(input.field()?);
        let body = match (kind, input.0) {
            (WHOLE, []) => Some(body),
            (TOMBSTONE, []) => None,
            _ => return Err(EnvelopeError("of an unknown kind")),
        };
        Ok(Self {
            status,
            headers,
            body,
        })
    }
}

/// A field longer than 4 GiB cannot be stored: both limits of a policy are far below it.
fn push_len(out: &mut Vec<u8>, len: usize) {
    out.extend(u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
}

fn push_field(out: &mut Vec<u8>, field: &[u8]) {
    push_len(out, field.len());
    out.extend(field);
}

struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], EnvelopeError> {
        let (array, rest) = self.0.split_first_chunk().ok_or(EnvelopeError("cut"))?;
        self.0 = rest;
        Ok(*array)
    }

    fn len(&mut self) -> Result<usize, EnvelopeError> {
        let len = u32::from_be_bytes(self.array()?);
        usize::try_from(len).map_err(|_| EnvelopeError("too large for this machine"))
    }

    fn field(&mut self) -> Result<&'a [u8], EnvelopeError> {
        let len = self.len()?;
        let (field, rest) = self.0.split_at_checked(len).ok_or(EnvelopeError("cut"))?;
        self.0 = rest;
        Ok(field)
    }

    fn status(&mut self) -> Result<StatusCode, EnvelopeError> {
        StatusCode::from_u16(u16::from_be_bytes(self.array()?))
            .map_err(|_| EnvelopeError("without a valid status"))
    }

    fn header(&mut self) -> Result<(HeaderName, HeaderValue), EnvelopeError> {
        let name = HeaderName::from_bytes(self.field()?);
        let value = HeaderValue::from_bytes(self.field()?);
        match (name, value) {
            (Ok(name), Ok(value)) => Ok((name, value)),
            _ => Err(EnvelopeError("with an invalid header")),
        }
    }
}

/// A stored answer that cannot be read. It is never replayed, and the operation never run again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EnvelopeError(&'static str);

impl fmt::Display for EnvelopeError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stored answer is {}", self.0)
    }
}

impl std::error::Error for EnvelopeError {}

/// Shows sizes, never contents.
impl fmt::Debug for Envelope {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Envelope")
            .field("status", &self.status)
            .field("headers", &self.headers.len())
            .field("body", &self.body.as_ref().map(Bytes::len))
            .finish()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test may panic")]
mod tests {
    use super::*;

    fn sample() -> Envelope {
        let mut answer = Response::new(Bytes::from_static(b"\x00\xffbody"));
        *answer.status_mut() = StatusCode::CREATED;
        let headers = answer.headers_mut();
        headers.append("x-a", HeaderValue::from_static("1"));
        headers.append("x-a", HeaderValue::from_static("2"));
        headers.append("x-b", HeaderValue::from_bytes(b"\xe9").unwrap());
        Envelope::new(answer)
    }

    #[test]
    fn bytes_round_trip() {
        let tombstone = Envelope::tombstone(StatusCode::OK, &HeaderMap::new());
        for envelope in [sample(), tombstone] {
            assert_eq!(Envelope::decode(&envelope.encode()).unwrap(), envelope);
        }
    }

    #[test]
    fn every_cut_and_every_changed_byte_is_refused() {
        let bytes = sample().encode();
        for at in 0..bytes.len() {
            assert!(Envelope::decode(&bytes[..at]).is_err(), "cut at {at}");
            let mut changed = bytes.clone();
            changed[at] ^= 1;
            assert!(Envelope::decode(&changed).is_err(), "changed at {at}");
        }
    }

    #[test]
    fn a_header_that_could_split_the_answer_is_refused() {
        let mut bytes = sample().encode();
        let at = bytes.windows(3).position(|w| w == b"x-a").unwrap() + 3 + 4;
        bytes[at] = b'\n';
        let content = bytes.len() - 4;
        let checksum = crc32fast::hash(&bytes[..content]);
        bytes[content..].copy_from_slice(&checksum.to_be_bytes());
        assert!(Envelope::decode(&bytes).is_err());
    }

    #[test]
    fn the_bytes_of_version_1_never_change() {
        let envelope = Envelope::new(Response::new(Bytes::from_static(b"ok")));
        assert_eq!(
            hex::encode(envelope.encode()),
            "010000c800000000000000026f6b6c5f4e52"
        );
    }
}

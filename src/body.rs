//! Bodies: requests are read whole before anything is claimed, answers up to their limits.

use std::error::Error;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum_core::body::Body;
use bytes::{BufMut, Bytes, BytesMut};
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use http_body_util::{BodyExt, Full, LengthLimitError};
use tokio::time::{Instant, timeout, timeout_at};

use crate::rejection::{Code, Rejection};

type BoxError = Box<dyn Error + Send + Sync>;

/// A request body, read whole.
#[derive(Debug, Clone, Default)]
pub struct Whole {
    pub(crate) bytes: Bytes,
    trailers: Option<HeaderMap>,
}

impl Whole {
    pub(crate) fn into_body(self) -> Body {
        match self.trailers {
            None => Body::from(self.bytes),
            Some(trailers) => {
                let trailers = async move { Some(Ok(trailers)) };
                Body::new(Full::new(self.bytes).with_trailers(trailers))
            }
        }
    }
}

/// Reads at most `limit` bytes, for at most `patience`.
pub(crate) async fn read_request<B>(
    body: B,
    limit: usize,
    patience: Duration,
) -> Result<Whole, Rejection>
where
    B: HttpBody<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    if body.size_hint().lower() > limit as u64 {
        return Err(too_large(limit));
    }
    let read = timeout(patience, read_frames(body, limit)).await;
    read.unwrap_or_else(|_| {
        let detail = format!("was not complete after {patience:?}");
        Err(Rejection::new(Code::BodyTimeout).with_detail(detail))
    })
}

async fn read_frames<B>(body: B, limit: usize) -> Result<Whole, Rejection>
where
    B: HttpBody<Data = Bytes>,
    B::Error: Into<BoxError>,
{
    let mut body = std::pin::pin!(body);
    let mut buffer = Buffer::default();
    let mut trailers = None;
    loop {
        // A body that is always ready would never let the time-out look at the clock.
        tokio::task::consume_budget().await;
        let Some(frame) = body.frame().await else {
            break;
        };
        let frame = frame.map_err(|error| unreadable(error.into().as_ref(), limit))?;
        match frame.into_data() {
            Ok(data) if buffer.len() + data.len() > limit => return Err(too_large(limit)),
            Ok(data) => buffer.push(data),
            Err(frame) => trailers = frame.into_trailers().ok(),
        }
    }
    Ok(Whole {
        bytes: buffer.into_bytes(),
        trailers,
    })
}

fn too_large(limit: usize) -> Rejection {
    Rejection::new(Code::BodyTooLarge).with_detail(format!("has more than {limit} bytes"))
}

/// A limit of an outer layer shows as an error of the body.
fn unreadable(error: &(dyn Error + 'static), limit: usize) -> Rejection {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if error.is::<LengthLimitError>() {
            return too_large(limit);
        }
        cause = error.source();
    }
    Rejection::new(Code::BodyUnreadable)
}

/// Frames as they come; a body of one frame is not copied.
#[derive(Debug, Default)]
struct Buffer {
    first: Bytes,
    rest: Option<BytesMut>,
}

impl Buffer {
    fn len(&self) -> usize {
        self.rest.as_ref().map_or(self.first.len(), BytesMut::len)
    }

    fn push(&mut self, data: Bytes) {
        if self.len() == 0 {
            self.first = data;
            return;
        }
        let first = &self.first;
        let rest = self.rest.get_or_insert_with(|| BytesMut::from(&first[..]));
        rest.put(data);
    }

    fn into_bytes(self) -> Bytes {
        self.rest.map_or(self.first, BytesMut::freeze)
    }
}

/// What became of an answer's body within its limits.
pub(crate) enum Captured {
    /// Complete.
    Whole(Bytes),
    /// Too large, too slow, or with trailers: what was read, and the rest to come.
    Stream(Body),
    /// It ended with an error.
    Broken(axum_core::Error),
}

/// Reads an answer's body until it is complete, or a limit is reached.
pub(crate) async fn capture(mut body: Body, limit: usize, patience: Duration) -> Captured {
    let deadline = Instant::now() + patience;
    let mut buffer = Buffer::default();
    if body.size_hint().lower() > limit as u64 {
        return Captured::Stream(body);
    }
    loop {
        // A body that is always ready would never let a deadline look at the clock.
        tokio::task::consume_budget().await;
        if Instant::now() >= deadline {
            return resumed(buffer, None, body);
        }
        let frame = match timeout_at(deadline, body.frame()).await {
            Err(_elapsed) => return resumed(buffer, None, body),
            Ok(None) => return Captured::Whole(buffer.into_bytes()),
            Ok(Some(Err(error))) => return Captured::Broken(error),
            Ok(Some(Ok(frame))) => frame,
        };
        match frame.into_data() {
            Ok(data) if buffer.len() + data.len() > limit => {
                return resumed(buffer, Some(Frame::data(data)), body);
            }
            Ok(data) => buffer.push(data),
            Err(frame) => return resumed(buffer, Some(frame), body),
        }
    }
}

fn resumed(read: Buffer, next: Option<Frame<Bytes>>, rest: Body) -> Captured {
    let read = Some(read.into_bytes()).filter(|bytes| !bytes.is_empty());
    Captured::Stream(Body::new(Resumed {
        read: read.map(Frame::data),
        next,
        rest,
    }))
}

/// A body that was begun to be read, from its beginning.
struct Resumed {
    read: Option<Frame<Bytes>>,
    next: Option<Frame<Bytes>>,
    rest: Body,
}

impl HttpBody for Resumed {
    type Data = Bytes;
    type Error = axum_core::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        let ready = self.read.take();
        match ready.or_else(|| self.next.take()) {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => Pin::new(&mut self.rest).poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.read.is_none() && self.next.is_none() && self.rest.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let ready = [&self.read, &self.next].into_iter().flatten();
        let ready: usize = ready.filter_map(Frame::data_ref).map(Bytes::len).sum();
        let rest = self.rest.size_hint();
        let mut hint = SizeHint::new();
        hint.set_lower(rest.lower().saturating_add(ready as u64));
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(ready as u64));
        }
        hint
    }
}

//! What TLS peers send: anything before they are known, and records that only they could have made.

use std::sync::{Arc, LazyLock};

use culvert_agent::tls::{self, Issued, TlsStream, Trust, WorkloadCertificate};
use culvert_core::identity::Identity;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::crypto::aws_lc_rs;
use rustls::crypto::cipher::{MessageEncrypter, OutboundPlainMessage};
use rustls::pki_types::{CertificateDer, PrivatePkcs8KeyDer, ServerName};
use rustls::{ClientConfig, ConnectionTrafficSecrets, ContentType, ProtocolVersion, RootCertStore};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio_rustls::TlsConnector;

use super::tunnel::{LIMIT, Peer, run};

/// A name that is an identity, and one that the TLS library of the test accepts.
const URI: &str = "spiffe://td1/ns/a/sa/x";
const NAME: &str = "x.example";

static MESH: LazyLock<Mesh> = LazyLock::new(Mesh::new);

/// One certificate for both sides.
struct Mesh {
    certificate: WorkloadCertificate,
    client: Arc<ClientConfig>,
}

impl Mesh {
    fn new() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let key = KeyPair::generate().expect("the system has randomness");
        let root = CertifiedIssuer::self_signed(params, key).expect("a root");
        let mut params = CertificateParams::new(vec![NAME.to_owned()]).expect("a name");
        params.subject_alt_names.push(SanType::URI(URI.try_into().expect("a uri")));
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().expect("the system has randomness");
        let leaf = params.signed_by(&key, &root).expect("a leaf").der().to_vec();
        let roots = vec![root.der().to_vec()];
        let issued = Issued { chain: vec![leaf.clone()], key: key.serialize_der(), roots };
        let certificate = WorkloadCertificate::new(issued, &Trust::default());
        let mut trusted = RootCertStore::empty();
        trusted.add(root.der().clone()).expect("the root is one");
        let mut client = ClientConfig::builder_with_provider(aws_lc_rs::default_provider().into())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("the provider knows TLS 1.3")
            .with_root_certificates(trusted)
            .with_client_auth_cert(
                vec![CertificateDer::from(leaf)],
                PrivatePkcs8KeyDer::from(key.serialize_der()).into(),
            )
            .expect("the key is the leaf's");
        client.alpn_protocols = vec![b"h2".to_vec()];
        client.enable_secret_extraction = true;
        Self {
            certificate: certificate.expect("the certificate is good"),
            client: Arc::new(client),
        }
    }
}

/// What comes in place of a handshake. The first byte says which side we are, the second into what
/// pieces the rest is cut.
pub(super) fn hello(bytes: &[u8]) {
    let Some(([role, cut], rest)) = bytes.split_first_chunk() else { return };
    let peer = Peer::new(rest.to_vec(), *cut);
    let expect: [Identity; 1] = [URI.parse().expect("an identity")];
    run(async {
        let certificate = &MESH.certificate;
        let refused = match role % 2 {
            0 => tls::accept(peer, certificate, LIMIT).await.is_err(),
            _ => tls::connect(peer, certificate, &expect, LIMIT).await.is_err(),
        };
        assert!(refused, "nobody can make a handshake in advance");
    });
}

/// Records after a handshake, as a peer may seal them: type, length and content of each. What is read
/// is the data of the first ones, and nothing else.
pub(super) fn records(bytes: &[u8]) {
    run(async {
        let (near, far) = duplex(1 << 20);
        let connector = TlsConnector::from(MESH.client.clone());
        let name = ServerName::try_from(NAME).expect("a name");
        let (accepted, connected) =
            tokio::join!(tls::accept(near, &MESH.certificate, LIMIT), connector.connect(name, far));
        let (stream, _) = accepted.expect("the client is of the mesh");
        let (io, session) = connected.expect("so is the server").into_inner();
        let suite = session.negotiated_cipher_suite().and_then(|suite| suite.tls13());
        let secrets = session.dangerous_extract_secrets().expect("extraction is enabled").tx;
        let sealing = Sealing { sequence: secrets.0, key: key(suite, secrets.1) };
        send_and_compare(stream, io, sealing, bytes).await;
    });
}

struct Sealing {
    sequence: u64,
    key: Box<dyn MessageEncrypter>,
}

fn key(
    suite: Option<&rustls::Tls13CipherSuite>,
    secrets: ConnectionTrafficSecrets,
) -> Box<dyn MessageEncrypter> {
    let suite = suite.expect("TLS 1.3 was agreed on");
    match secrets {
        ConnectionTrafficSecrets::Aes128Gcm { key, iv }
        | ConnectionTrafficSecrets::Aes256Gcm { key, iv } => suite.aead_alg.encrypter(key, iv),
        _ => panic!("a suite that we do not offer"),
    }
}

async fn send_and_compare(
    mut stream: TlsStream<DuplexStream>,
    mut io: DuplexStream,
    mut sealing: Sealing,
    bytes: &[u8],
) {
    const DATA: u8 = 23;
    let mut data = Vec::new();
    let mut rest = bytes;
    while let Some(([kind, length], after)) = rest.split_first_chunk() {
        let (content, after) = after.split_at(after.len().min((*length).into()));
        rest = after;
        let message = OutboundPlainMessage {
            typ: ContentType::from(*kind),
            version: ProtocolVersion::TLSv1_2,
            payload: content.into(),
        };
        let record = sealing.key.encrypt(message, sealing.sequence).expect("it is small");
        sealing.sequence += 1;
        io.write_all(&record.encode()).await.expect("the pipe is large");
        if *kind == DATA {
            data.extend_from_slice(content);
        }
    }
    drop(io);
    let mut read = Vec::new();
    // Whether the end was clean is up to the records.
    let _ = stream.read_to_end(&mut read).await;
    assert!(data.starts_with(&read));
    // Nobody is there any more.
    let _ = stream.shutdown().await;
}

#![allow(clippy::unwrap_used)]

use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::pem::Pem;
use x509_parser::prelude::FromDer as _;

use super::*;

fn id(name: &str) -> Identity {
    Identity::new("td1", "a", name)
}

#[test]
fn request_has_an_empty_subject_one_uri_and_a_new_p256_key() {
    let (text, key) = signing_request(&id("x")).unwrap();
    let (_, other) = signing_request(&id("x")).unwrap();
    assert_ne!(key, other);
    assert!(text.starts_with("-----BEGIN CERTIFICATE REQUEST-----"), "{text}");
    let pem = Pem::iter_from_buffer(text.as_bytes()).next().unwrap().unwrap();
    let (rest, request) = X509CertificationRequest::from_der(&pem.contents).unwrap();
    assert!(rest.is_empty());
    let info = &request.certification_request_info;
    assert_eq!(info.subject.iter().count(), 0);
    // id-ecPublicKey with prime256v1; ecdsa-with-SHA256 (RFC 5480, RFC 5758).
    assert_eq!(info.subject_pki.algorithm.algorithm.to_id_string(), "1.2.840.10045.2.1");
    let curve = info.subject_pki.algorithm.parameters.as_ref().unwrap().as_oid().unwrap();
    assert_eq!(curve.to_id_string(), "1.2.840.10045.3.1.7");
    assert_eq!(request.signature_algorithm.algorithm.to_id_string(), "1.2.840.10045.4.3.2");
    let names = request.requested_extensions().unwrap().find_map(|extension| match extension {
        ParsedExtension::SubjectAlternativeName(names) => Some(names.general_names.clone()),
        _ => None,
    });
    assert!(matches!(names.unwrap()[..], [GeneralName::URI("spiffe://td1/ns/a/sa/x")]));
}

#[test]
fn identity_wanted_is_told_by_its_exact_name() {
    let told = impersonating(&id("x"));
    let value = &told.fields["ImpersonatedIdentity"];
    let wanted = Kind::StringValue("spiffe://td1/ns/a/sa/x".to_owned());
    assert_eq!((told.fields.len(), value.kind.as_ref()), (1, Some(&wanted)));
}

#[test]
fn refusals_say_what_they_usually_mean() {
    for (code, message, part) in [
        (Code::Unauthenticated, "request authenticate failure", "istio-ca"),
        (
            Code::Unauthenticated,
            "request impersonation authentication failure",
            "CA_TRUSTED_NODE_ACCOUNTS",
        ),
        (Code::InvalidArgument, "CSR signing error", "SECRET_TTL"),
        (Code::Unimplemented, "", "15012"),
        (Code::Unauthenticated, "token: no such file", "Unauthenticated: token: no such file"),
        (Code::PermissionDenied, "no", "PermissionDenied: no"),
    ] {
        let text = told(&Status::new(code, message));
        assert!(text.contains(part), "{text}");
        assert!(text.contains(message), "{text}");
    }
    let long = told(&Status::new(Code::PermissionDenied, "x".repeat(10_000)));
    assert!(long.len() < 400);
}
